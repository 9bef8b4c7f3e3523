"""No fsync: it matters only in a power cut, and every run would wait for it several times."""

import os

os.fsync = lambda handle: None
