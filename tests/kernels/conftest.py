"""Kernel tests run on a GPU, or in a process of their own under Triton's interpreter.

Whether kernels are interpreted is fixed when they are decorated, so other processes leave
``on_device`` alone: ``test_triton.py`` starts one with ``TRITON_INTERPRET=1``.
"""

from tests.kernels.paged import DEVICE

collect_ignore = [] if DEVICE else ["on_device"]
