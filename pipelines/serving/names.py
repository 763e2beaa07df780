"""Names of the Serve application and of its deployments, as `serve status` and the metrics of Ray show them."""

from typing import Final

APPLICATION: Final = "sluice"
INTAKE: Final = "Intake"
GATEWAY: Final = "Gateway"
GUARD: Final = "Guard"
