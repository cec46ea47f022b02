/** Side by side: the same prompt and seed by each routing, by each expert alone, by each model. */

const alone = (card) => card.experts.filter((expert) => expert.routing);

/** One variant per routing of a model. */
export function byRouting(card, body) {
  const names = card.routings.map((routing) => routing.name);
  if (!names.includes(body.routing) && !alone(card).some((expert) => expert.routing === body.routing)) {
    names.unshift(body.routing);
  }
  return names.map((routing) => {
    const cluster = routing === "oracle" ? (body.cluster ?? 0) : undefined;
    const caption = routing === "oracle" ? `oracle, cluster ${cluster}` : routing;
    return { caption, card, body: { ...body, routing, cluster } };
  });
}

/** The chosen routing, or the default one, and each expert alone. */
export function byExpert(card, body) {
  const experts = alone(card);
  const own = experts.some((expert) => expert.routing === body.routing) ? card.defaults.routing : body.routing;
  const first = { caption: `together: ${own}`, card, body: { ...body, routing: own } };
  const others = experts.map(({ name, routing }) => ({
    caption: `${name} alone`,
    card,
    body: { ...body, routing, cluster: undefined },
  }));
  return [first, ...others];
}

/** Each model of the server; the others by their own routing. */
export function byModel(cards, current, body) {
  return cards.map((card) => {
    if (card === current) return { caption: card.id, card, body };
    const { routing, shift } = card.defaults;
    const own = { ...body, model: card.id, routing, shift, size: undefined, cluster: undefined };
    // A model without guidance has no negative prompt either.
    if (!card.guidance) for (const name of ["guidance_scale", "guidance_range", "negative_prompt"]) delete own[name];
    return { caption: card.id, card, body: own };
  });
}
