"""What to do first: the worst part of a token, why it is slow, and what would help.

Every second of a token is either needed (a part at its roofline) or lost. The largest loss is the
bottleneck; where little is lost, it is the ceiling itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from headrace.instrument import Ceilings
from headrace.profile.record import Group

AT_THE_ROOF = 0.1
"""A largest loss below this share of the token: what limits it is the machine."""

MEMORY_BOUND = 0.5
"""A part that reads at this share of the bandwidth or more waits for memory, not for itself."""


class Cause(StrEnum):
    """GAPS: threads at a barrier, or a device idle between two kernels. HOST: the device waits for
    the host. MEMORY, COMPUTE: a part waits for its bytes, or for its own instructions."""

    HOST = "host"
    GAPS = "gaps"
    MEMORY = "memory"
    COMPUTE = "compute"


@dataclass(frozen=True)
class Bottleneck:
    """``operation`` and ``part``: the worst part. ``share``: of the token, what that part takes, or
    what the gaps or the host take in all. ``lost``: of the token, what could be won at most."""

    cause: Cause
    operation: str
    part: str
    share: float
    lost: float
    sentence: str


def find(
    parts: Sequence[Group],
    ceilings: Ceilings,
    *,
    total: float,
    gaps: float,
    outside: float,
    threads: bool,
    unit: str,
) -> Bottleneck:
    """``total``: mean seconds of a token (or prompt: ``unit``); ``gaps`` between parts on the
    device, ``outside``: of the host, beyond its parts. ``threads``: they meet at barriers."""
    device = [group for group in parts if not group.host]
    host = [group for group in parts if group.host]
    losses: list[tuple[float, Cause, Group]] = []
    for group in device:
        busy = group.seconds.mean - group.waiting.mean
        losses.append((busy - group.ideal(ceilings), _cause(group, ceilings), group))
    waiting = sum(group.waiting.mean for group in device)
    losses.append((waiting + gaps, Cause.GAPS, max(device, key=lambda g: g.waiting.mean)))
    hosted = sum(group.seconds.mean for group in host) + outside
    losses.append((hosted, Cause.HOST, max(host or device, key=lambda g: g.seconds.mean)))
    lost, cause, group = max(losses, key=lambda loss: loss[0])
    if lost < AT_THE_ROOF * total:
        largest, where = lost, group
        group = max(device, key=lambda g: g.ideal(ceilings))
        lost = max(0.0, group.seconds.mean - group.ideal(ceilings))
        cause = Cause.MEMORY if group.is_bound_by_memory(ceilings) else Cause.COMPUTE
        share = group.seconds.mean / total
        sentence = _at_the_roof(cause, group, share, ceilings, unit)
        sentence += f" No other loss is above {max(0.0, largest / total):.0%} ({label(where)})."
    else:
        share = {Cause.GAPS: lost, Cause.HOST: lost}.get(cause, group.seconds.mean) / total
        sentence = _lost(cause, group, share, lost / total, ceilings, unit, threads)
    first = group.first
    return Bottleneck(cause, first.operation, first.name, share, lost / total, sentence)


def _cause(group: Group, ceilings: Ceilings) -> Cause:
    """Why a part is not faster. By its speed, not by its place under the roofline: what is bound by
    memory there may be far below it."""
    return (
        Cause.MEMORY
        if group.is_bound_by_memory(ceilings)
        and group.bytes_per_second >= MEMORY_BOUND * ceilings.bytes_per_second
        else Cause.COMPUTE
    )


def _speed(group: Group, ceilings: Ceilings) -> str:
    reads, can = group.bytes_per_second / 1e9, ceilings.bytes_per_second / 1e9
    digits = 0 if can >= 100 else 1
    return f"{reads:,.{digits}f} of the {can:,.{digits}f} GB/s this machine reads"


def _at_the_roof(cause: Cause, group: Group, share: float, ceilings: Ceilings, unit: str) -> str:
    if cause is Cause.MEMORY:
        return (
            f"Memory is the limit: the largest part, {label(group)}, is {share:.0%} of the {unit} "
            f"at {_speed(group, ceilings)}. Fewer bytes would help: a smaller quantisation, or "
            "more sequences in a step."
        )
    return (
        f"Arithmetic is the limit: the largest part, {label(group)}, is {share:.0%} of the {unit} "
        f"at {group.flops_per_second / 1e9:,.0f} GFLOP/s, {group.roofline_share(ceilings):.0%} of "
        "its roofline. More cores or faster instructions would help."
    )


def _lost(
    cause: Cause,
    group: Group,
    share: float,
    lost: float,
    ceilings: Ceilings,
    unit: str,
    threads: bool,
) -> str:
    match cause:
        case Cause.HOST:
            return (
                f"The host is the limit: the device waits for it {share:.0%} of the {unit}, most "
                f"in {label(group)}. Preparing a step while the last one runs would help."
            )
        case Cause.GAPS if threads:
            return (
                f"Barriers are the limit: threads wait for each other {share:.0%} of the {unit}, "
                f"most in {label(group)}. A core to each thread would help (an idle machine, or "
                "fewer --threads), or fewer phases."
            )
        case Cause.GAPS:
            return (
                f"Launch gaps are the limit: the device waits between its kernels {share:.0%} of "
                f"the {unit}, most before {label(group)}. Fewer, larger kernels would help, or "
                "launching them together."
            )
        case Cause.MEMORY:
            return (
                f"Memory is the limit: {label(group)} is {share:.0%} of the {unit} at "
                f"{_speed(group, ceilings)}. Asking for its bytes earlier would help, by up to "
                f"{lost:.0%} of the {unit}; so would fewer bytes."
            )
    return (
        f"Compute is the limit: {label(group)} is {share:.0%} of the {unit} at "
        f"{group.roofline_share(ceilings):.0%} of its roofline: its own instructions hold it, not "
        f"memory. A faster kernel would help, by up to {lost:.0%} of the {unit}."
    )


def label(group: Group) -> str:
    return f"{group.first.name} ({group.first.operation})"
