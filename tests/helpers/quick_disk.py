"""Files are not forced onto the disk: only a power cut would tell, and each run of a test would wait several times."""

import os

os.fsync = lambda handle: None
