"""OpenVINO, imported without its telemetry: ``import openvino`` alone sends an event, and foldexport sends nothing to anybody.

OpenVINO replaces the package ``openvino_telemetry`` by a stub of its own where that cannot be imported
(``openvino/tools/ovc/telemetry_stub.py``); so it cannot be, for the time of the import. A process that has imported OpenVINO
before is left as it is.
"""

from __future__ import annotations

import sys

TELEMETRY = "openvino_telemetry"

if "openvino" not in sys.modules:
    sys.modules.setdefault(TELEMETRY, None)
try:
    import openvino
finally:
    if sys.modules.get(TELEMETRY, "absent") is None:
        del sys.modules[TELEMETRY]

__all__ = ["openvino"]
