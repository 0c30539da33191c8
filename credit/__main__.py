import os
import sys

from credit.cli import main

code = main()
if code:
    # The ranks stop at different moments, and torch's threads may then abort the interpreter on its way out (seen: -6
    # after the message was printed). Launchers act on the code, so it is given at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
