import os
import sys
from multiprocessing import util

from credit.cli import main

code = main()
if code:
    # The ranks stop at different moments, and torch's threads may then abort the interpreter on its way out (seen: -6
    # after the message was printed). Launchers act on the code, so it is given at once; but for what workers that read
    # data share with this process, of which Python would say that it leaked.
    util._run_finalizers(0)  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
