"""A plan as tables on the terminal, and as plain values for JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from atoll.plan import law
from atoll.plan.cost import training_flops
from atoll.plan.numbers import binary, count, gflop, in_bytes, number, plain, roughly, short, span
from atoll.plan.types import Machine, Plan, PlannedCommon, PlannedExpert, PlannedGeneralist
from atoll.report.words import cut_captions

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from atoll.plan.measure_machine import Comparison

NARROW = 512  # widths below have products too small to keep a GPU busy
COLUMNS = 3  # experts of different cost, side by side
_UNCOUNTED = "Shares: equal, until atoll encode has counted the images of each size."
UNITS = (("days", 1), ("hours", 24), ("minutes", 1440))  # with their number per day


def as_json(plan: Plan, start: date | None = None) -> dict[str, Any]:
    """Plain values; with finishing dates if islands were simulated, from `start` (default today)."""
    # Dataclasses and pydantic models as plain values; keys become strings.
    value = {**asdict(plan), "islands": [island.model_dump(mode="json") for island in plan.islands]}
    value["batches"] = {
        name: {
            switches: {f"{memory / 1e9:g}GB": batch for memory, batch in by.items()} for switches, by in ladder.items()
        }
        for name, ladder in plan.batches.items()
    }
    found = law.one_model(plan)
    value["one_model"] = asdict(found) if found else None
    if plan.simulation:
        value["finish"] = {
            "start": (start or date.today()).isoformat(),
            "median": _day(plan.simulation.median_days, start),
            "p90": _day(plan.simulation.p90_days, start),
        }
    return value


def render(plan: Plan, start: date | None = None) -> "Group":
    """The tables, for `rich.print`."""
    from rich.console import Group
    from rich.text import Text

    # Networks, batches, time and price, data, islands.
    parts: list[Any] = []
    for table in _networks(plan):
        parts += [table, Text()]
    parts += [*_sizes(plan), *_batches(plan), _time(plan), Text(_time_notes(plan), style="dim")]
    if len(plan.machines) == 1:
        parts += [Text(_how(plan.machines[0], _trained(plan)))]
    parts += [Text(line) for line in (*_swaps(plan), *_muon(plan), *_targets(plan), *_routes(plan))]
    parts += [Text(line) for line in _models_of_all(plan)] + [Text(_sampling(plan)), Text(_data(plan))]
    if found := law.one_model(plan):
        parts += [Text(), law.table(found), *map(Text, law.sentences(found))]
    if plan.cut is not None:
        parts += [Text(f"{cut_captions(*plan.cut)}.")]
    if plan.simulation:
        parts += [Text(), _islands(plan), Text(_finish(plan, start))]
    return Group(*parts)


def comparison_lines(comparisons: Sequence["Comparison"]) -> str:
    """One line for each finished training and its prediction."""
    return "\n".join(
        f"{c.name}: {c.images:,} images in {c.measured_seconds:,.1f} s, predicted {c.predicted_seconds:,.1f} s "
        f"(measured / predicted {c.ratio:.2f}); {c.mfu:.0%} of {c.flops / 1e9:,.0f} GFLOP/s"
        for c in comparisons
    )


def _table(title: str, columns: Iterable[str]) -> "Table":
    """A table whose first column is text; the others are numbers."""
    from rich.table import Table

    # Numbers to the right, so that digits align.
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=not index, overflow="fold")
    return table


def _trained(plan: Plan) -> tuple[PlannedExpert, ...]:
    """The experts, and the models of all clusters if there are any."""
    return (*plan.experts, *_of_all(plan))


def _of_all(plan: Plan) -> list[PlannedExpert]:
    """The common model and the generalist, if there are any."""
    return [one.training for one in (plan.common, plan.generalist) if one]


def _groups(plan: Plan) -> list[tuple[str, PlannedExpert]]:
    """Experts of equal cost, once: ("8 experts" or the one's name, the first of them); each model of all alone."""
    # The cost depends on the network at all sizes, steps and batch alone.
    same: dict[tuple[Any, ...], list[PlannedExpert]] = {}
    for e in plan.experts:
        same.setdefault((e.sizes, e.steps, e.batch), []).append(e)
    groups = [(f"{len(es)} experts" if len(es) > 1 else es[0].name, es[0]) for es in same.values()]
    return groups + [(e.name, e) for e in _of_all(plan)]


def _networks(plan: Plan) -> list["Table"]:
    """The cost of one image, by expert; experts of equal cost share a column."""
    groups = _groups(plan)
    tables = []
    for start in range(0, len(groups), COLUMNS):
        # The router stands in the last table.
        shown = groups[start : start + COLUMNS]
        router = start + COLUMNS >= len(groups)
        title = f"{plan.name}: the networks ({plan.precision})"
        table = _table(title, ("", *(name for name, _ in shown), *(["router"] if router else [])))
        r = plan.router
        last = {"parameters": count(r.parameters), "images": count(r.images)}
        last |= {"GFLOP an image, forward": gflop(r.flops / 3), "    in training": gflop(r.flops)}
        columns = [_costs(expert) for _, expert in shown]
        for row in columns[0]:
            table.add_row(row, *(column[row] for column in columns), *([last.get(row, "")] if router else []))
        tables.append(table)
    return tables


def _costs(e: PlannedExpert) -> dict[str, str]:
    return {
        "parameters": count(e.parameters),
        "GFLOP an image, forward": gflop(e.forward_flops),
        "    in training": gflop(e.training_flops),
        "activations an image": binary(e.activation_bytes),
        "    compiled": binary(e.activation_bytes_compiled),
        "    fully checkpointed": binary(e.activation_bytes_checkpointed),
        "weights, moments, EMA, ...": in_bytes(e.fixed_bytes),
        "batch": str(e.batch),
        "steps": f"{e.steps:,}",
        "images": count(e.images),
    }


def _sizes(plan: Plan) -> list[Any]:
    """The cost at each size of the images, once per network; nothing if there is one size."""
    from rich.text import Text

    parts: list[Any] = []
    distinct = {expert.network: expert for expert in reversed(plan.experts)}  # the first of each
    # Times only for one GPU of known speed: a column each would not fit.
    machine = plan.machines[0] if len(plan.machines) == 1 else None
    for expert in (e for e in plan.experts if e in distinct.values() and len(e.sizes) > 1):
        seconds = machine.step_seconds.get(expert.name, ()) if machine else ()
        title = "The sizes of the images" + (f", network of {expert.name}" if len(distinct) > 1 else "")
        columns = ("pixels", "share", "tokens", "GFLOP an image, forward", "in training", "s a step")
        table = _table(title, columns if seconds else columns[:-1])
        # Numbers of each size, and their mean by the shares.
        costs = [
            (size.tokens, size.forward_flops / 1e9, size.training_flops / 1e9, *seconds[i : i + 1])
            for i, size in enumerate(expert.sizes)
        ]
        shares = [size.share for size in expert.sizes]
        means = [
            sum(share * value for share, value in zip(shares, column, strict=True))
            for column in zip(*costs, strict=True)
        ]
        names = [*(size.image for size in expert.sizes), "mean"]
        for name, share, values in zip(names, [*shares, 1.0], [*costs, means], strict=True):
            table.add_row(name, f"{share:.1%}", f"{values[0]:,.0f}", *map(number, values[1:]))
        empty = ", ".join(size.image for size in expert.sizes if not size.share)
        note = _UNCOUNTED if not plan.counted else f"No image fills {empty}." if empty else None
        parts += [table, *([Text(note, style="dim")] if note else []), Text()]
    return parts


def _batches(plan: Plan) -> list[Any]:
    from rich.text import Text

    parts: list[Any] = []
    for name, ladder in plan.batches.items():
        # All rows have the same memories.
        memories = list(next(iter(ladder.values())))
        title = "Largest batch at a time" + (f", network of {name}" if len(plan.batches) > 1 else "")
        table = _table(title, ("switches", *(in_bytes(memory) for memory in memories)))
        # Where the line is too narrow, the words are broken, not the numbers.
        for index, column in enumerate(table.columns):
            column.no_wrap = index > 0
        for switches, by in ladder.items():
            table.add_row(switches, *(str(by[memory]) if by[memory] else "-" for memory in memories))
        parts += [table, Text()]
    return parts


def _time(plan: Plan) -> "Table":
    # The unit in which the longest plan is at least two.
    known = [m.total_gpu_days for m in plan.machines if m.total_gpu_days is not None]
    unit, per_day = next((u for u in UNITS if max(known, default=2) * u[1] >= 2), UNITS[-1])
    apart = ["of all clusters"] if _of_all(plan) else []
    columns = ("GPU", "memory", "TFLOP/s", "MFU", "images/s", "per expert")
    table = _table(f"Time and price, in GPU-{unit} and USD", (*columns, *apart, "in all", "router", "USD"))
    for m in plan.machines:
        # Experts of different cost show as a range.
        rates = sorted(m.images_per_s[name] for name in m.gpu_days)
        days = sorted(m.gpu_days.values())
        # The common model and the generalist together.
        both = [m.common_gpu_days] * bool(plan.common) + [m.generalist_gpu_days] * bool(plan.generalist)
        own = [None if None in both else math.fsum(days or 0 for days in both)] if both else []
        speed = f"{m.gpu.tflops:.3g}" if m.gpu.tflops else "?"
        table.add_row(
            m.gpu.name if m.each == 1 else f"{m.each} x {m.gpu.name}",
            in_bytes(m.gpu.memory),
            speed,
            f"{m.mfu:.2f}" if m.gpu.tflops else "?",
            span(rates) if rates else "?" if all(m.fits.values()) else "does not fit",
            span([day * per_day for day in days]),
            *("?" if t is None else short(t * per_day) for t in (*own, m.total_gpu_days, m.router_gpu_days)),
            "?" if m.usd is None else f"{m.usd:,.0f}" if m.usd >= 10 else f"{m.usd:.2f}",
        )
    return table


def _time_notes(plan: Plan) -> str:
    if any(m.gpu.name == "here" for m in plan.machines):
        return "TFLOP/s: of this machine's matrix products, measured now; MFU: of training steps of the first expert."
    text = "MFU is assumed, without checkpointing and compiled: state another with --mfu. Prices are of March 2026."
    if min(e.network.width for e in plan.experts) < NARROW:
        text += f" Networks narrower than {NARROW} reach less of it."
    return text


def _how(m: Machine, experts: Iterable[PlannedExpert]) -> str:
    """The recommended switches in words, once per different recommendation."""
    lines: dict[str, list[str]] = {}
    for e in experts:
        if fit := m.fits[e.name]:
            batch = f"batch {e.batch}" + (f" on {m.each} GPUs, each" if m.each > 1 else "")
            batch += f" as {fit.accumulate} x {fit.micro_batch}" if fit.accumulate > 1 or m.each > 1 else ""
            recipe = f"the recipe has: {e.recipe_switches}" + (
                f", accumulate {e.accumulate}" if e.accumulate > 1 else ""
            )
            if (e.recipe_switches, e.accumulate) == (fit.switches, fit.accumulate):
                recipe = "as in the recipe"
            line = f"{batch} with: {fit.switches} (up to {fit.largest} at a time; {recipe})"
            if e.name in m.step_seconds:
                shares = (size.share for size in e.sizes)
                step = sum(share * s for share, s in zip(shares, m.step_seconds[e.name], strict=True))
                line += f"; a step takes {number(step)} s"
            lines.setdefault(line, []).append(e.name)
    return "\n".join(
        f"On {m.gpu.name}{'' if len(lines) == 1 else f', {names[0]} and {len(names) - 1} more'}: {line}"
        for line, names in lines.items()
    )


def _swaps(plan: Plan) -> list[str]:
    """What crosses PCIe in a step of the recipe, for experts whose blocks are swapped; once per cost."""
    return [
        f"block_swap of {name}: {in_bytes(e.swap_bytes)} over PCIe a step, {e.swap_bytes / 16e9:.2g} s at 16 GB/s, "
        f"{e.swap_bytes / 32e9:.2g} s at 32 GB/s, while the GPU waits (not measured)."
        for name, e in _groups(plan)
        if e.swap_bytes
    ]


def _muon(plan: Plan) -> list[str]:
    """What Muon computes beside a step's own products, and the moments that it does not have; once per cost."""
    return [
        f"Muon of {name}: {number(e.muon.flops / 1e9)} GFLOP a step beside the step's own "
        f"{number(e.batch * e.training_flops / 1e9)}, and {in_bytes(e.muon.saved_bytes)} less than planned above."
        for name, e in _groups(plan)
        if e.muon
    ]


def _models_of_all(plan: Plan) -> list[str]:
    """What the common model and the generalist cost, if there are any."""
    lines = [_common(plan.common)] if plan.common else []
    return lines + ([_generalist(plan.generalist)] if plan.generalist else [])


def _common(common: PlannedCommon) -> str:
    """What the common start costs, counted once for the run."""
    e, count = common.training, len(common.experts)
    starting = f"{count} expert{'s' if count != 1 else ''} start{'s' if count == 1 else ''} from it"
    return (
        f"Common start: {e.steps:,} steps of {e.batch} on all clusters, once for the run: {common.fraction:.1%} of the "
        f"training FLOPs, those of all experts included; {starting}."
    )


def _generalist(generalist: PlannedGeneralist) -> str:
    """What the generalist costs, and where it is used."""
    e, levels = generalist.training, generalist.levels
    where = "where a cluster has no expert" if levels is None else f"at the levels {levels[0]:g} to {levels[1]:g}"
    return (
        f"Generalist: {e.steps:,} steps of {e.batch} on all clusters: {generalist.fraction:.1%} of the training FLOPs, "
        f"those of all experts included; used {where}."
    )


def _targets(plan: Plan) -> list[str]:
    """What targets of representation add, which no table counts; once per cost."""
    return [
        f"Targets of {name}: a projector of {number(e.targets.parameters / 1e6)} M parameters, "
        f"{in_bytes(e.targets.state_bytes)} and {number(e.targets.flops / 1e9)} GFLOP an image more than planned "
        f"above, beside {number(e.training_flops / 1e9)}."
        for name, e in _groups(plan)
        if e.targets
    ]


def _routes(plan: Plan) -> list[str]:
    """What the FLOPs of experts with routed tokens are the mean of, at the main size; once per cost."""
    return [
        f"Routed tokens of {name}: in {route.share:.0%} of the steps {route.kept:,} of {size.tokens:,} image tokens "
        f"pass blocks {route.first} to {route.last - 1} (from 0). Training FLOPs and times are the mean of all steps, "
        f"{size.training_flops / training_flops(size.network):.0%} of those without; memory is that of all tokens."
        for name, e in _groups(plan)
        if (route := (size := e.sizes[0]).route)
    ]


def _sampling(plan: Plan) -> str:
    """What an image costs, by the number of experts that are evaluated."""
    s, least = plan.sampling, plan.sampling.flops["top-1"]
    unit, size = ("TFLOP", 1e12) if least >= 1e12 else ("GFLOP", 1e9)
    costs = [f"{number(flops / size)} by {name}" for name, flops in s.flops.items()]
    guided = "guided " if s.calls > 1 else ""
    return (
        f"An image takes {s.steps} {guided}steps, in {unit} {', '.join(costs)} (all experts: "
        f"{s.flops['full'] / least:.1f} times top-1)."
    )


def _data(plan: Plan) -> str:
    if plan.images is None or plan.download_bytes is None:
        return "Download: state the number of images with --images."
    # How often each image is seen, over all experts and the models of all clusters.
    epochs = sum(e.images for e in _trained(plan)) / plan.images
    # An island returns float32 weights of one expert.
    weights = 4 * max(e.parameters for e in plan.experts)
    # One that starts from the common model needs that, too.
    start = (
        f", the common model's {in_bytes(plan.common.bytes)} besides," if plan.common and plan.common.experts else ""
    )
    return (
        f"Data: {plan.images:,} images, seen {plain(epochs)} times; an island downloads "
        f"{in_bytes(plan.download_bytes)} ({roughly(plan.download_bytes * 8 / 100e6)} at 100 Mbit/s; "
        f"up to a quarter more for the largest cluster){start} and gives back {in_bytes(weights)}."
    )


def _islands(plan: Plan) -> "Table":
    s = plan.simulation
    assert s is not None
    table = _table("Islands", ("island", "hours a day", "machine hours", "done, days", "is the last", "experts"))
    table.columns[-1].justify = "left"
    # An expert's name begins with its cluster.
    clusters = {name.partition("-")[0] for names in s.assignment.values() for name in names}
    alone = len(clusters) == sum(map(len, s.assignment.values()))  # no replicas: the cluster's number is enough
    for island in plan.islands:
        table.add_row(
            island.name,
            f"{island.hours_per_day:g}",
            f"{s.hours[island.name]:,.0f}",
            f"{s.days[island.name]:,.1f}",
            f"{s.decides.get(island.name, 0):.0%}",
            ", ".join(name.partition("-")[0] if alone else name for name in s.assignment[island.name]) or "none",
        )
    return table


def _finish(plan: Plan, start: date | None) -> str:
    s = plan.simulation
    assert s is not None
    # The island that most often finishes last.
    last = max(s.decides, key=lambda name: s.decides[name])
    # Islands train experts; the common model is trained before.
    after = ", counted from the day on which the common model is trained" if plan.common else ""
    return (
        f"Done on {_day(s.median_days, start)} ({s.median_days:.1f} days; in nine of ten trials by "
        f"{_day(s.p90_days, start)}, {s.p90_days:.1f} days){after}. "
        f"{last} decides it in {s.decides[last]:.0%} of the trials. "
        f"Idle {s.idle:.0%} of the hours offered; {s.failures:.1f} failures and {s.dropouts:.1f} dropouts, "
        f"{s.lost:.1%} of the training done twice. ({s.trials} trials, seed {s.seed})"
    )


def _day(days: float, start: date | None) -> str:
    return ((start or date.today()) + timedelta(days=days)).isoformat()
