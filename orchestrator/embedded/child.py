"""Run as a program: die with the process that started us, then become the command given.

`prctl` between fork and exec of a threaded parent is not safe, so this small program does it in the child.
The signal follows the *thread* that started the child: start children from a thread that stays.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            # It died before we asked to be told.
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
