"""``--report FILE.html``: what a command did, on one page that asks the network for nothing.

:mod:`~foldexport.report.html.document` collects the facts as plain values, :func:`~foldexport.report.html.page.page` is a pure
function of them.
"""
