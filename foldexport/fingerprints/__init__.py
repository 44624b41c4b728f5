"""Networks of torchvision and timm, recognised by a fingerprint of their keys and shapes.

The table is data: looking a file up imports neither package. Networks that share a fingerprint and compute the same are one
*function*; between functions only what the file says of itself can decide, and else the user is asked.

    keys and shapes ─ table.lookup ─▶ functions ─ evidence.claims ─▶ fewer functions ─ build.network ─▶ nn.Module
"""

from __future__ import annotations

from foldexport.fingerprints.matching import Match, match, told_inputs, unlike

__all__ = ["Match", "match", "told_inputs", "unlike"]
