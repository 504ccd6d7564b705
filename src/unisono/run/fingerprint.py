"""What of the machine belongs to a run's definition: recorded with the run; a difference on resume is said."""

import platform
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Facts that change a result's last bits: kernels differ between versions, instruction sets and thread counts."""

    torch: str
    cpu_capability: str
    machine: str
    threads: int
    device: str

    def differences(self, other: dict[str, object]) -> list[str]:
        """One phrase for every fact in which a recorded fingerprint differs from this one."""
        mine = asdict(self)
        return [f"{key} was {other[key]}, is {mine[key]}" for key in mine if key in other and other[key] != mine[key]]


def fingerprint(threads: int, device: torch.device) -> Fingerprint:
    """The fingerprint of this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Fingerprint(
        torch=torch.__version__.split("+")[0],
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        machine=platform.machine(),
        threads=threads,
        device=name,
    )
