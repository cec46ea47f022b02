"""The studio and the description of the API, from files that were read at the start: no request opens a file."""

import json
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from atoll.report.page import table
from atoll.serve.refusals import Refusal

STATIC = Path(__file__).parent / "static"  # index.html at /, the others at /static/NAME
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}


def add_pages(app: FastAPI, directory: Path = STATIC) -> None:
    """Add the page, its files and /docs to an app.

    Args:
        app: the app, with all routes of the API.
        directory: its files are read now, and are the only ones.
    """
    files = {
        file.name: (file.read_bytes(), _KINDS[file.suffix])
        for file in sorted(directory.iterdir())
        if file.is_file() and file.suffix in _KINDS
    }

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        # Without the page, the API is described.
        return answer("index.html") if "index.html" in files else RedirectResponse("/docs")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return answer(name)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(api_page(app.openapi()), media_type=_KINDS[".html"], headers={"cache-control": "no-cache"})

    def answer(name: str) -> Response:
        if name not in files:
            raise Refusal(404, "no such page", code="not_found")
        content, kind = files[name]
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})


def api_page(schema: dict[str, Any]) -> str:
    """Return the page that describes an API: no scripts, and nothing from another host."""
    info = schema["info"]
    routes = [
        _operation(method.upper(), path, operation)
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    bodies = [_body(name, body) for name, body in schema["components"]["schemas"].items() if name.endswith("Body")]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(info["title"])}: API</title>\n<link rel="stylesheet" href="/static/docs.css"></head>\n'
        f"<body><main>\n<h1>{escape(info['title'])}: API</h1>\n<p>{escape(info['summary'])} "
        'The same for programs: <a href="/openapi.json">/openapi.json</a>.</p>\n'
        f"{''.join(routes)}\n<h2>Bodies</h2>\n{''.join(bodies)}</main></body></html>\n"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    """Return the section of one route."""
    answers = "".join(
        f"<tr><th scope=row>{escape(status)}</th><td>{escape(answer['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    examples = "".join(
        f"<p>{escape(example['summary'])}:</p><pre>{escape(_curl(path, example['value']))}</pre>"
        for example in body.get("examples", {}).values()
    )
    if body:
        name = body["schema"]["$ref"].rpartition("/")[2]
        examples = f'<p>Body: <a href="#{escape(name)}">{escape(name)}</a>.</p>{examples}'
    text = "".join(f"<p>{escape(part)}</p>" for part in operation.get("description", "").split("\n\n"))
    return (
        f"<section><h2><code>{method} {escape(path)}</code></h2>{text}{examples}"
        f"{table('', answers, 'Answers')}</section>\n"
    )


def _curl(path: str, value: dict[str, Any]) -> str:

    return f"curl -s http://localhost:8080{path} -d '{json.dumps(value)}'"


def _body(name: str, body: dict[str, Any]) -> str:
    """Return the section of one body."""
    rows = "".join(
        f"<tr><th scope=row><code>{escape(key)}</code></th><td>{escape(_type(value))}</td>"
        f"<td>{escape(value.get('description', ''))}</td></tr>"
        for key, value in body["properties"].items()
    )
    return f'<section id="{escape(name)}"><h3>{escape(name)}</h3>{table("", rows, name)}</section>\n'


def _type(value: dict[str, Any]) -> str:
    """Return the type of a property in words."""
    kinds = [kind for kind in value.get("anyOf", [value]) if kind.get("type") != "null"]
    words = []
    for kind in kinds:
        if "enum" in kind or "const" in kind:
            words.append(" | ".join(str(choice) for choice in kind.get("enum", [kind.get("const")])))
        elif kind["type"] == "array":
            words.append(f"list of {_type(kind['items'])}")
        else:
            low, high = kind.get("minimum", ""), kind.get("maximum", "")
            bounds = f" {low}..{high}" if (low, high) != ("", "") else ""
            words.append(kind["type"] + bounds)
    return " or ".join(words)
