"""``vmalloc ab`` from a checkout: the same command with the same options.

Owns: nothing.  Thread-safety: one process, one comparison.
"""

import sys

from vmalloc.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "ab")
    main()
