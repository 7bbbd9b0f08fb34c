"""scripts.train as a command, with FSDP also on CPUs, where accelerate would silently train by DDP instead.

Layers are compiled without code of their own being generated, which takes minutes on CPUs.
"""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from scripts import training_model
from scripts.train import main

initialise = AcceleratorState.__init__


def initialise_sharded(self, *args, fsdp_plugin=None, **kwargs):
    """As on GPUs: the plugin and its precision; every later instance shares them, but would forget the kind."""
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
    if getattr(self, "fsdp_plugin", None) is not None:
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = initialise_sharded
training_model.BACKEND = "aot_eager_decomp_partition"
sys.exit(main())
