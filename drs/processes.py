"""What worker processes of a sweep and of an evaluation share."""

import os
import threading
import time

PARENT_CHECK_SECONDS = 0.5


def end_with_parent(parent: int) -> None:
    """End this process soon after the process ``parent`` has ended, however that came about; returns at once."""
    threading.Thread(target=_wait_for, args=(parent,), daemon=True).start()


def _wait_for(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)
