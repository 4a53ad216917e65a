"""Memory of the device that runs a model."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not allocate memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; for all but CUDA, of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
