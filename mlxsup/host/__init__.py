"""What this machine has: devices with their memory, and what is free of it.

All of it looks at the machine: it reads files and asks drivers, off the loop.
"""

from __future__ import annotations

from mlxsup.host.device import MINIMUM, Device, Found, Kind
from mlxsup.host.memory import Gauge, devices, home, ram

__all__ = ["MINIMUM", "Device", "Found", "Gauge", "Kind", "devices", "home", "ram"]
