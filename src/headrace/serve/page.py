"""The chat page at ``/``: one answer, no build step, nothing from any other address."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter()
_HERE = Path(__file__).parent


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def chat_page() -> HTMLResponse:
    """The page, under a policy that lets only its own script and style run."""
    html, policy = _page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """``page.html`` with its style and script in it, and the policy that allows just these."""
    html = (_HERE / "page.html").read_text("utf-8")
    hashes = {}
    for tag, name in (("style", "page.css"), ("script", "page.js")):
        text = (_HERE / name).read_text("utf-8")
        html = html.replace(f"<{tag}></{tag}>", f"<{tag}>{text}</{tag}>")
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
        f"style-src 'sha256-{hashes['style']}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy
