"""`ray start` for a second node on loopback: Ray would join the head at the machine's outer address, where it does not
listen. What runs below the node behaves as below the head."""

from __future__ import annotations

import os
import sys

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"

from ray._private import services
from ray.scripts.scripts import main

services.resolve_ip_for_localhost = lambda host: host
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

if __name__ == "__main__":
    sys.exit(main())
