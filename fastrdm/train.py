"""`torchrun fastrdm/train.py [CONFIG.yaml] [a.b=c ...]`: train one encoder; the quick start without arguments."""

import os
import sys

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # run as a file: else fastrdm/kernels would stand for `kernels`, fastrdm/runtime/log.py for `log`
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a clone that is not installed

from fastrdm.worker import die_with_launcher

if __name__ == "__main__":
    die_with_launcher()  # before torch is imported, which takes seconds

from fastrdm.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
