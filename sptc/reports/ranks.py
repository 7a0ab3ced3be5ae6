"""Which of several processes speaks."""

import torch.distributed as dist


def is_first_rank() -> bool:
    """Whether this process is rank 0 of torch.distributed, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
