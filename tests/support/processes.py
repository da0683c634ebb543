"""Programs that a test runs and whose output it reads."""

import functools
import subprocess

captured = functools.partial(subprocess.run, capture_output=True, text=True)
