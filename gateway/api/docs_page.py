"""`/v1/docs`: the OpenAPI document as one HTML page, without scripts or external resources."""

from __future__ import annotations

import re
from html import escape
from string import Template
from typing import Any, Final

Json = dict[str, Any]

CONTENT_SECURITY_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
EXAMPLE: Final = (
    "curl --json @examples/offer.json $GATEWAY/v1/offers\n"
    "curl $GATEWAY/v1/tasks?state=queued,running\n"
    "curl -N $GATEWAY/v1/events?types=task,progress"
)

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title><style>
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--get:#0a7ea4;--post:#2e7d32;--dim:#777}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:2rem 1.2rem 6rem;font:16px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:1.9rem}
h2{margin:2.4rem 0 .6rem;font-size:1.25rem}h2 small{font-weight:400;color:var(--dim)}
h4{margin:1rem 0 .3rem;font-size:.8rem;text-transform:uppercase;letter-spacing:.05em;color:var(--dim)}
code,pre{font:.86em/1.5 ui-monospace,monospace}
pre{padding:.8rem 1rem;background:var(--soft);border-radius:.4rem;overflow-x:auto}
details{border:1px solid var(--line);border-radius:.4rem;margin:.45rem 0;scroll-margin-top:1rem}
details>div{padding:0 1rem 1rem}summary{padding:.55rem 1rem;cursor:pointer}
summary span{color:var(--dim);margin-left:.7rem}
b.get,b.post{display:inline-block;min-width:3.6rem;padding:0 .5rem;border-radius:.25rem;color:#fff;
font-size:.75rem;text-align:center;margin-right:.6rem}b.get{background:var(--get)}b.post{background:var(--post)}
table{border-collapse:collapse;width:100%}td{border-top:1px solid var(--line);padding:.3rem .8rem .3rem 0;
vertical-align:top}td:first-child{white-space:nowrap}.dim{color:var(--dim)}a{color:var(--get)}
</style></head><body>
<h1>$title</h1><p class="dim">version $version &middot; <a href="openapi.json">openapi.json</a></p>
<p>$description</p><p>$access</p><pre>$example</pre>
$operations
<h2>Messages</h2>
$schemas
</body></html>
""")
_ACCESS: Final = (
    "With an <code>api_token_file</code> the gateway requires <code>Authorization: Bearer TOKEN</code>; with "
    "curl, put that line into a file and use <code>-H @FILE</code>. Without one it accepts only local "
    "requests."
)


def page(document: Json) -> str:
    """Return the page, in the order of the document."""
    info = document["info"]
    return _PAGE.substitute(
        title=escape(info["title"]),
        version=escape(info["version"]),
        description=_prose(info["description"]),
        access=_ACCESS,
        example=escape(EXAMPLE),
        operations="\n".join(_tag(tag, document) for tag in document["tags"]),
        schemas="\n".join(_message(name, it) for name, it in document["components"]["schemas"].items()),
    )


def _tag(tag: Json, document: Json) -> str:
    operations = [
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if tag["name"] in operation["tags"]
    ]
    head = f"<h2>{escape(tag['name'])} <small>{escape(tag['description'])}</small></h2>"
    return "\n".join([head, *operations])


def _operation(method: str, path: str, operation: Json) -> str:
    parts = []
    if "description" in operation:
        parts.append(f"<p>{_prose(operation['description'])}</p>")
    if not operation["security"]:
        parts.append("<p class=dim>Needs no token.</p>")
    if "parameters" in operation:
        rows = [
            (
                f"<code>{escape(each['name'])}</code>",
                f"{_kind(each['schema'])}. {_prose(each['description'])}",
            )
            for each in operation["parameters"]
        ]
        parts.append(f"<h4>Parameters</h4>{_table(rows)}")
    if "requestBody" in operation:
        parts.append(f"<h4>Body</h4><p>{_contents(operation['requestBody']['content'])}</p>")
    rows = [
        (f"<code>{status}</code>", f"{_prose(answer['description'])} {_contents(answer['content'])}")
        for status, answer in operation["responses"].items()
    ]
    parts.append(f"<h4>Responses</h4>{_table(rows)}")
    return (
        f'<details id="{escape(operation["operationId"])}"><summary><b class={method}>{method.upper()}</b>'
        f"<code>{escape(path)}</code><span>{_prose(operation['summary'])}</span></summary>"
        f"<div>{''.join(parts)}</div></details>"
    )


def _contents(content: Json) -> str:
    found = []
    for media_type, what in content.items():
        found.append(f"{_kind(what['schema'])} <span class=dim>({escape(media_type)})</span>")
        if events := what.get("x-events"):
            rows = [(f"<code>{escape(name)}</code>", _kind(schema)) for name, schema in events.items()]
            found.append(_table(rows))
    return " ".join(found)


def _message(name: str, schema: Json) -> str:
    parts = []
    if "enum" in schema:
        values = ", ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
        parts.append(f"<p>one of {values}</p>")
    required = schema.get("required", ())
    rows = [
        (
            f"<code>{escape(field)}</code>{'' if field in required else ' <span class=dim>optional</span>'}",
            f"{_kind(it)} {_prose(it.get('description', ''))}",
        )
        for field, it in schema.get("properties", {}).items()
    ]
    if rows:
        parts.append(_table(rows))
    about = _prose(" ".join(schema.get("description", "").split()))
    head = f"<summary><code>{escape(name)}</code><span>{about}</span></summary>"
    return f'<details id="{escape(name)}">{head}<div>{"".join(parts)}</div></details>'


def _kind(schema: Json) -> str:
    """Describe a schema in a few words."""
    if ref := schema.get("$ref"):
        name = escape(ref.rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if options := schema.get("anyOf"):
        return " or ".join(_kind(option) for option in options)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if kind == "object" and "additionalProperties" in schema:
        inner = schema["additionalProperties"]
        return f"object of {_kind(inner)}" if isinstance(inner, dict) else "object"
    limits = [
        f"{word} {schema[key]:g}"
        for key, word in (
            ("exclusiveMinimum", "above"),
            ("minimum", "from"),
            ("maximum", "to"),
            ("minLength", "from"),
            ("maxLength", "to"),
        )
        if key in schema
    ]
    return " ".join([str(kind), *limits])


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{left}</td><td>{right}</td></tr>" for left, right in rows)
    return f"<table>{cells}</table>"


def _prose(text: str) -> str:
    """Return escaped text, with `code` as HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
