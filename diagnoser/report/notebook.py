"""The page where a notebook shows it: in a frame of its own, so that neither touches the other."""

from __future__ import annotations

import html


def framed(page: str) -> str:
    """Returns a page inside an ``iframe`` that holds all of it as text.

    The page's own scripts run there, and reach nothing of the notebook around.
    """
    # Without a base of its own, a link to a finding would lead to the notebook's address.
    inside = page.replace("<head>", '<head>\n<base href="about:srcdoc">', 1)
    return (
        f'<iframe srcdoc="{html.escape(inside)}" sandbox="allow-scripts allow-modals" '
        'title="diagnoser report" style="width: 100%; height: 45rem; border: 0"></iframe>'
    )
