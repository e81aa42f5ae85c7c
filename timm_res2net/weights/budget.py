"""What reading a file may take, by its size: memory, time, and how deep it may nest."""

import time

from .errors import CheckpointError

__all__ = ['Budget']

# Reading and loading a file takes at most 10 times its size and 100 MB. These are less, as not all of it is counted:
# the bytes of the file itself, and what Python needs to keep an object.
TIMES_SIZE, ALLOWANCE = 8, 32_000_000  # bytes
# Of this thread's own work, as a slow disk or a busy machine is no attack. Most of the time is for what the thread may
# have to do beside reading: Python's garbage collector looks at all objects of the process, half a second for millions.
SECONDS, BYTES_PER_SECOND = 1.2, 20_000_000
DEEPEST = 16  # dicts or sequences within each other
CHECKED = 64  # so many expenses to one look at the clock


class Budget:
    """What may still be spent on a file. All readers spend from one, before they make what they pay for."""

    def __init__(self, size: int) -> None:
        self.size = size  # of the file
        self.memory = TIMES_SIZE * size + ALLOWANCE
        self.deadline = time.thread_time() + SECONDS + size / BYTES_PER_SECOND
        self.expenses = 0

    def spend(self, memory: int) -> None:
        """Takes bytes off the budget.

        Raises:
            CheckpointError: If memory or time is used up.
        """
        self.memory -= memory
        if self.memory < 0:
            raise CheckpointError(f'its {self.size:,} bytes unpack to much more, which no file of weights does')
        self.expenses += 1
        if self.expenses % CHECKED == 0 and time.thread_time() > self.deadline:
            raise CheckpointError(f'its {self.size:,} bytes take longer to read than those of any file of weights')

    @staticmethod
    def require_depth(depth: int) -> None:
        """Raises a CheckpointError if something is nested deeper than a file of weights is."""
        if depth > DEEPEST:
            raise CheckpointError(f'it is nested deeper than {DEEPEST} levels, which no file of weights is')
