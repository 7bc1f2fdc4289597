"""What this machine has: devices with their memory, what is free of it, and whether a need fits.

`devices` looks at the machine (off the loop: it reads files and asks drivers); `fits` only compares.
"""

from __future__ import annotations

from mlxsup.host.device import MINIMUM, Device, Found, Kind, fits
from mlxsup.host.memory import devices, home, ram

__all__ = ["MINIMUM", "Device", "Found", "Kind", "devices", "fits", "home", "ram"]
