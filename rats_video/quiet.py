"""Libraries that say at every start what concerns nobody here."""

from __future__ import annotations

import logging
import warnings

# torchao, where it is installed, warns of kernels and classes that nothing here uses; transformers says that
# torchvision is not there, which nothing here needs.
TALKATIVE = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "transformers.utils.import_utils",
)


def quiet_libraries() -> None:
    """Has them log errors alone; of tqdm's bars in a notebook nothing here makes one."""
    warnings.filterwarnings("ignore", "IProgress not found")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of predictions changed in place: there are none
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
