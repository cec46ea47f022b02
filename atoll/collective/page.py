"""status.html: where a collective stands, as a page that anyone can open from its store."""

from collections.abc import Iterable, Sequence
from html import escape

from atoll.collective.leases import when
from atoll.collective.status import CollectiveStatus
from atoll.report.page import document, table

STATUS_PAGE = "status.html"


def status_page(status: CollectiveStatus) -> str:
    """Render a status as one HTML document. What strangers wrote in it is text."""
    charter = status.collective.charter
    lead = (
        f"<p>Charter {charter.version}, {escape(when(status.now))} by the store's clock. "
        f"Identity: <code>{status.collective.identity}</code></p>"
        "<p>This page is not signed. <code>atoll collective status</code> checks what it shows.</p>"
    )
    works = [
        (
            one.work,
            status.experts.get(one.work, ""),
            one.state(status.now),
            str(one.epoch or ""),
            status.collective.name_of(one.holder) if one.holder else "",
            when(one.until) if one.state(status.now) in ("held", "expired") else "",
        )
        for one in status.works
    ]
    offers = [(one.submission, one.name, one.work, one.submitter, one.state) for one in status.submissions]
    routers = [(one.router[:16] or "-", str(one.clusters or ""), one.state) for one in status.routers]
    growth = "".join(f"<p>{escape(line)}</p>" for line in status.growth)
    return document(
        charter.name,
        lead + growth,
        [
            ("Work", _rows(("work", "expert", "state", "epoch", "holder", "until"), works)),
            ("Router", _rows(("router", "clusters", "state"), routers)),
            ("Submissions", _rows(("submission", "expert", "work", "owner", "state"), offers)),
        ],
    )


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text; the first column names the row."""
    body = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    titles = "".join(f"<th>{name}</th>" for name in head)
    return table(f"<tr>{titles}</tr>", body, head[0], "text") if body else "<p>None yet.</p>"
