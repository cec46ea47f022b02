"""The reference of atoll.yaml as Markdown: a table per section, read from the classes that validate it."""

import ast
import re
from pathlib import Path

HEAD = """# atoll.yaml

One file holds every choice of a run. It is validated before anything is computed; an unknown key is an error that names
the known ones. This page is made from the classes in `atoll/manifest/`.
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def manifest_page(package: Path) -> str:
    """The page for the sections of atoll.yaml.

    Args:
        package: the directory of `atoll.manifest`.
    """
    sections: dict[str, str] = {}
    keys: dict[str, str] = {}  # class -> the key of atoll.yaml that it validates
    first = ("run.py", "objective.py", "clusters.py", "training.py", "sampling.py")
    for name in (*first, "data.py", "buckets.py", "targets.py", "network.py", "evaluation.py"):
        source = (package / name).read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                sections[node.name] = _section(node, source.splitlines())
            if isinstance(node, ast.ClassDef) and node.name == "Manifest":
                for field in _fields(node):
                    for section in re.findall(r"\w+Settings", ast.unparse(field.annotation)):
                        keys[section] = field.target.id  # type: ignore[union-attr]
    whole = sections.pop("Manifest")
    parts = [f"## The whole file\n\n{whole}"]
    for name, text in sections.items():
        parts.append(f"## {f'`{keys[name]}`' if name in keys else name}\n\n{text}")
    return "\n\n".join([HEAD, *parts]) + "\n"


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    return [field for field in fields if not ast.unparse(field.annotation).startswith("ClassVar")]


def _section(node: ast.ClassDef, lines: list[str]) -> str:
    """The docstring and the table of one class."""
    prose, _, attributes = (ast.get_docstring(node) or "").partition("Attributes:\n")
    meanings = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE)
    }
    rows = []
    for field in _fields(node):
        key = field.target.id  # type: ignore[union-attr]
        default, bounds = _default(field.value)
        remark = meanings.get(key) or _comment(lines, field)
        cells = (f"`{key}`", f"{_type(field.annotation)}{bounds}", default, remark)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    inherits = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id != "Section"]
    note = f"\n\nThe keys of {inherits[0]} besides." if inherits else ""
    table = "\n".join(["| key | type | default | |", "|---|---|---|---|", *rows]) if rows else ""
    return f"{prose.strip()}{note}\n\n{table}".strip()


def _type(annotation: ast.expr) -> str:
    """A type in words: `none`, `min-snr`; or int > 0 or null."""
    if isinstance(annotation, ast.BinOp):
        return f"{_type(annotation.left)} or {_type(annotation.right)}"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return ", ".join(f"`{choice}`" for choice in ast.literal_eval(annotation.slice))
    text = ast.unparse(annotation)
    return {"PositiveInt": "int > 0", "None": "null"}.get(text, f"`{text}`" if "[" in text else text)


def _default(value: ast.expr | None) -> tuple[str, str]:
    """The default as Markdown, and the bounds of the value."""
    if value is None:
        return "required", ""
    bounds = ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        limits = {k.arg: ast.unparse(k.value) for k in value.keywords if k.arg}
        bounds = "".join(f", {sign} {limits[name]}" for name, sign in BOUNDS.items() if name in limits)
        text = ast.unparse(value.args[0]) if value.args else limits.get("default_factory", "...")
        text = {"dict": "{}", "list": "[]", "...": "required"}.get(text, text.removeprefix("lambda: "))
    else:
        text = ast.unparse(value)
    if text.endswith("Settings()"):
        return "", bounds
    text = {"None": "null", "True": "true", "False": "false"}.get(text, text.replace("'", ""))
    return (text if text == "required" else f"`{text}`"), bounds


def _comment(lines: list[str], field: ast.AnnAssign) -> str:
    """The comment behind a field, or the comment lines right above it."""
    end = (field.end_lineno or field.lineno) - 1
    behind = lines[end].encode()[field.end_col_offset :].decode().strip()
    if behind.startswith("#"):
        return behind.lstrip("# ")
    above: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.insert(0, line.strip().lstrip("# "))
    return " ".join(above)
