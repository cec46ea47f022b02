"""The commands of a collective: many owners of one model, through any object store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atoll.cli.app import Quiet, app, bar
from atoll.errors import AtollError, escaped

if TYPE_CHECKING:
    from atoll.collective.publish_router import ApprovedRouter

collective_app = typer.Typer(
    no_args_is_help=True, help="Train one model with people you have never met, through any object store."
)
app.add_typer(collective_app, name="collective", rich_help_panel="Tools")

Url = Annotated[str, typer.Argument(help="s3://, gs://, az://, hf://OWNER/NAME, or a directory.")]
KeyOption = Annotated[Path, typer.Option("--key", help="Your key, from `atoll collective key`.")]
MemberOption = Annotated[
    Path | None, typer.Option("--run", "-r", help="Directory that joined; default: the one here that did.")
]
KEY = Path("atoll.key")


@collective_app.command("key")
def make_key(
    out: Annotated[Path, typer.Argument(help="File of the new key; it is never replaced.")] = KEY,
) -> None:
    """Make the key that signs everything you do in a collective."""
    from atoll.collective.keys import Key

    key = Key.generate()
    key.save(out)
    typer.echo(f"{out} written; keep it secret, and keep a copy: it cannot be replaced\n{key.id}")


@collective_app.command("open")
def open_(
    url: Url,
    run: Annotated[Path, typer.Option("--run", "-r", help="The run to found it on, with clusters/.")] = Path(),
    key: KeyOption = KEY,
    name: Annotated[str | None, typer.Option(help="Name of the collective; default: the run's.")] = None,
    lease_hours: Annotated[float, typer.Option(min=0.01, max=8760, help="Length of a lease without heartbeat.")] = (
        24.0
    ),
    expires_days: Annotated[float, typer.Option(min=1, max=3650, help="You must renew the charter within.")] = 365.0,
    joining: Annotated[str, typer.Option(help="open: any key may work; invited: those that you add.")] = "open",
    quiet: Quiet = False,
) -> None:
    """Found a collective: publish atoll.yaml, the clusters and the router's data of a run."""
    from atoll.collective.open import Joining, open_collective

    if joining not in ("open", "invited"):
        raise AtollError(f"--joining {joining}: expected open or invited")
    with bar("open", "files", quiet) as update:
        identity = open_collective(
            url,
            run,
            key,
            name=name,
            lease_hours=lease_hours,
            expires_days=expires_days,
            joining=cast("Joining", joining),
            progress=update,
        )
    typer.echo(f"{url} is open; give contributors its address and its identity:\n{identity}")


@collective_app.command()
def join(
    url: Url,
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to make.")],
    key: KeyOption = KEY,
    name: Annotated[str | None, typer.Option(help="Your name, for people; default: the directory's.")] = None,
    identity: Annotated[str | None, typer.Option(help="The collective's identity, from its founder.")] = None,
) -> None:
    """Join a collective: fetch its manifest and clustering, with all signatures and hashes checked."""
    from atoll.collective.join import join_collective

    joined = join_collective(url, out, key, name=name or out.absolute().name, identity=identity)
    # Without a pin the first contact is trusted, so the user should compare.
    note = "" if identity else "; compare it with the founder's"
    typer.echo(f"{out} written; the collective is {joined}{note}")


@collective_app.command()
def grow(
    url: Url,
    key: Annotated[list[Path] | None, typer.Option(help="Another founder's key, if several must sign.")] = None,
    run: MemberOption = None,
    quiet: Quiet = False,
) -> None:
    """Publish a cluster that the founder's run has more, after `atoll cluster --new-cluster` or `--split`."""
    from atoll.collective.grow import grow_collective
    from atoll.collective.member import find_member, full_url

    with bar("grow", "files", quiet) as update:
        done = grow_collective(find_member(full_url(url), run), more_keys=tuple(key or ()), progress=update)
    typer.echo(
        f"charter {done.charter} published: {done.before} clusters became {done.clusters}; {done.uploaded} of "
        f"{done.files} files were new; members run `atoll collective follow {url}`"
    )


@collective_app.command()
def follow(url: Url, run: MemberOption = None) -> None:
    """Follow a collective that grew: update atoll.yaml and the clustering; trainings and experts stay."""
    from atoll.collective.follow import follow_collective
    from atoll.collective.member import find_member, full_url

    directory = find_member(full_url(url), run)
    done = follow_collective(directory)
    if done.before == done.clusters:
        typer.echo(f"{directory} knows all {done.clusters} clusters")
    else:
        works = ", ".join(done.works)
        typer.echo(f"{directory} knows {done.clusters} clusters, before {done.before}; new work: {works}")


@collective_app.command()
def claim(
    url: Url,
    cluster: Annotated[int | None, typer.Option(min=0, help="The cluster; default: the next that nobody has.")] = None,
    replica: Annotated[int, typer.Option(min=0, max=99, help="A further expert of the cluster.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Also take finished work.")] = False,
    share_checkpoints: Annotated[
        bool, typer.Option("--share-checkpoints", help="Training publishes its state, for whoever takes over.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fetch the state that an earlier holder shared; trusts that holder.")
    ] = False,
    run: MemberOption = None,
    quiet: Quiet = False,
) -> None:
    """Take a cluster to train, and fetch its shards. Training renews the lease."""
    from atoll.collective.member import find_member, full_url
    from atoll.collective.work import claim_work

    directory = find_member(full_url(url), run)
    with bar("claim", "files", quiet) as update:
        claimed = claim_work(
            directory,
            cluster=cluster,
            replica=replica,
            again=again,
            share=share_checkpoints,
            resume=resume,
            progress=update,
        )
    lease, expert = claimed.lease, claimed.expert or claimed.lease.work.split(".")[0]
    flag = ""
    if claimed.checkpoint is not None:
        typer.echo(f"the checkpoint is from {claimed.checkpoint}")
        flag = " --resume"
    typer.echo(
        f"work {lease.work} is yours (epoch {lease.epoch}) until {claimed.until}; "
        f"`atoll train expert {expert} -r {directory}{flag}` trains it and renews the lease"
    )


@collective_app.command()
def release(
    url: Url,
    work: Annotated[str | None, typer.Option(help="The work item, such as 3 or 3.1; default: all of yours.")] = None,
    run: MemberOption = None,
) -> None:
    """Give work back, so that others need not wait until its lease ends."""
    from atoll.collective.member import find_member, full_url
    from atoll.collective.work import release_work

    for lease in release_work(find_member(full_url(url), run), work):
        typer.echo(f"work {lease.work} (epoch {lease.epoch}) is free again")


@collective_app.command()
def publish(
    path: Annotated[Path, typer.Argument(help="A trained expert, or the router, in the directory that joined.")],
    url: Annotated[str | None, typer.Argument(help="The collective; default: the one that was joined.")] = None,
    quiet: Quiet = False,
) -> None:
    """Offer a trained expert; admitters and founders: a router, after `grow` the extended one. Uploads and signs it."""
    from atoll.collective.publish import publish_expert
    from atoll.collective.publish_router import is_router, publish_router

    with bar("publish", "files", quiet) as update:
        if is_router(path):
            typer.echo(_approval_line(publish_router(path, url, progress=update)))
            return
        done = publish_expert(path, url, progress=update)
    kind = "as a replica: another member holds its work, or nobody claimed it" if done.replica else "for admission"
    typer.echo(f"{done.submission} published {kind}")


@collective_app.command()
def approve(
    url: Url,
    router: Annotated[str, typer.Argument(help="The router's hash, or its beginning; `status` lists what waits.")],
    key: Annotated[Path | None, typer.Option(help="Your key; default: the one that joined.")] = None,
    run: MemberOption = None,
    quiet: Quiet = False,
) -> None:
    """Sign that a published router shall enter the model, where several admitters or founders must."""
    from atoll.collective.member import find_member, full_url
    from atoll.collective.publish_router import approve_router

    with bar("approve", "files", quiet) as update:
        done = approve_router(find_member(full_url(url), run), router, key_file=key, progress=update)
    typer.echo(_approval_line(done))


def _approval_line(router: "ApprovedRouter") -> str:
    """The outcome of an approval, in one line."""
    if router.version is not None:
        return f"{router.router} is the model's router: index {router.version} names it"
    return (
        f"{router.router} has {router.signers} approvals; the next index that an admitter publishes after "
        f"{router.admitters} admitters or {router.founders} founders approved names it"
    )


@collective_app.command()
def probe(
    encoded: Annotated[Path, typer.Argument(help="Output of `atoll encode` for images that nobody else has.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to make; keep it secret.")],
    run: Annotated[Path, typer.Option("--run", "-r", help="The directory that joined, or the founder's run.")] = Path(),
) -> None:
    """Assign secret images to the collective's clusters, for `admit --probe`. Nothing is uploaded."""
    from atoll.cluster import write_probe
    from atoll.storage.layout import RunLayout

    counts = write_probe(RunLayout(run).clusters, encoded, out)
    typer.echo(
        f"{out} written: {sum(counts):,} images, {min(counts):,} to {max(counts):,} in a cluster; keep it secret"
    )


@collective_app.command()
def admit(
    url: Url,
    submissions: Annotated[
        list[str] | None, typer.Argument(help="Submissions to judge; default: all without a report of yours.")
    ] = None,
    probe: Annotated[Path, typer.Option(help="Secret shards, laid out as clusters/; never uploaded.")] = Path("probe"),
    rows: Annotated[int, typer.Option(min=16, max=4096, help="Secret rows for each expert.")] = 64,
    key: Annotated[Path | None, typer.Option(help="Your key; default: the one that joined.")] = None,
    run: MemberOption = None,
    quiet: Quiet = False,
) -> None:
    """Judge what was offered on secret rows, sign a report, and let in what enough admitters accepted."""
    from atoll.collective.admit import admit_submissions
    from atoll.collective.member import find_member, full_url

    directory = find_member(full_url(url), run)
    with bar("admit", "files", quiet) as update:
        outcomes = admit_submissions(
            directory, probe, submissions=submissions or (), key_file=key, rows=rows, progress=update
        )
    for one in outcomes:
        verdict = {True: "accepted", False: "refused", None: "not judged"}[one.accepted]
        verdict += ", and in" if one.entered else ""
        # Of an accepted expert the report holds the reasons.
        reasons = "" if one.accepted else f": {'; '.join(one.reasons)}"
        typer.echo(escaped(f"{one.submission} {one.name or '(broken)'} {verdict}{reasons}"))
    if not outcomes:
        typer.echo("nothing to judge: every submission has a report of yours")


@collective_app.command()
def retire(
    url: Url,
    expert: Annotated[str, typer.Argument(help="An admitted expert's submission, or its name.")],
    why: Annotated[str, typer.Option(help="The reason, for people.")],
    key: Annotated[Path | None, typer.Option(help="Your key; default: the one that joined.")] = None,
    run: MemberOption = None,
) -> None:
    """Sign that an admitted expert must leave; it leaves when enough retirers did."""
    from atoll.collective.member import find_member, full_url
    from atoll.collective.retire import retire_expert

    done = retire_expert(find_member(full_url(url), run), expert, why, key)
    state = "is out" if done.out else "leaves when enough retirers signed and an admitter publishes the next index"
    typer.echo(f"{done.submission} {state}")


@collective_app.command()
def members(
    url: Url,
    add: Annotated[list[str] | None, typer.Option(help="A key id to add; repeatable.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="A key id to remove; repeatable.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Renew the charter's date and nothing else.")] = False,
    expires_days: Annotated[float, typer.Option(min=1, max=3650, help="The new charter expires after.")] = 365.0,
    key: Annotated[list[Path] | None, typer.Option(help="Another founder's key, if several must sign.")] = None,
    run: MemberOption = None,
) -> None:
    """List members and requests; a founder adds and removes members."""
    from atoll.collective.member import find_member, full_url
    from atoll.collective.members import change_members, list_members

    directory = find_member(full_url(url), run)
    if add or remove or renew:
        charter = change_members(
            directory,
            add=tuple(add or ()),
            remove=tuple(remove or ()),
            expires_days=expires_days,
            more_keys=tuple(key or ()),
        )
        typer.echo(f"charter {charter.version} published")
    # Lines rather than a table, since a key is as wide as a terminal.
    for person in list_members(directory):
        typer.echo(f"{person.key}  {person.role}  {person.name}")


@collective_app.command()
def status(
    url: Url,
    identity: Annotated[str | None, typer.Option(help="The collective's identity, from its founder.")] = None,
    page: Annotated[Path | None, typer.Option(help="Also write it as an HTML page to this file.")] = None,
    publish_page: Annotated[
        bool, typer.Option("--publish", help="Also write it to status.html in the store, for anyone to open.")
    ] = False,
) -> None:
    """Show who trains what, and what was offered. Needs no key, and only rights to read."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from atoll.collective.leases import when
    from atoll.collective.status import collective_status

    now = collective_status(url, identity)
    charter, console = now.collective.charter, Console()
    clock = when(now.now) if now.exact else f"after {when(now.now)} (the store can only be read)"
    console.print(f"{charter.name}, charter {charter.version}, {clock}", markup=False)
    console.print(now.collective.identity, markup=False)
    for line in now.growth:
        console.print(line, markup=False)
    # Who trains what.
    table = Table("work", "expert", "state", "epoch", "holder", "until")
    for one in now.works:
        holder = now.collective.name_of(one.holder) if one.holder else ""
        state = one.state(now.now)
        until = when(one.until) if state in ("held", "expired") else ""
        # As text: what strangers wrote is no markup.
        row = (one.work, now.experts.get(one.work, ""), state, str(one.epoch or ""), holder, until)
        table.add_row(*map(Text, row))
    console.print(table)
    # Routers, where there is more to say than that the founder's is the model's.
    if len(now.routers) > 1 or any(one.router for one in now.routers):
        table = Table("router", "clusters", "state")
        for router in now.routers:
            table.add_row(*map(Text, (router.router[:16], str(router.clusters or ""), router.state)))
        console.print(table)
    # What was offered.
    if now.submissions:
        table = Table("submission", "expert", "work", "owner", "state")
        table.columns[0].no_wrap = True
        for offer in now.submissions:
            cells = (offer.submission, offer.name, offer.work, offer.submitter, offer.state)
            table.add_row(*map(Text, cells))
        console.print(table)
    # The same as a page.
    if page is not None or publish_page:
        from atoll.collective.connect import open_store
        from atoll.collective.page import STATUS_PAGE, status_page
        from atoll.storage.artifact import write_bytes

        html = status_page(now).encode()
        if page is not None:
            write_bytes(page, html)
            typer.echo(f"{page} written")
        if publish_page:
            store = open_store(url)
            store.write(STATUS_PAGE, html)
            typer.echo(f"{store.place(STATUS_PAGE)} written")
