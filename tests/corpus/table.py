"""The whole table."""

from __future__ import annotations

from tests.corpus.decoders import DECODERS
from tests.corpus.encoders import ENCODERS
from tests.corpus.row import Row, Variant
from tests.corpus.seq2seq import SEQ2SEQ
from tests.corpus.vision_audio import VISION_AUDIO

__all__ = ["ROWS", "VARIANTS"]

ROWS: tuple[Row, ...] = (*DECODERS, *ENCODERS, *SEQ2SEQ, *VISION_AUDIO)
MIXED = ("bert", "roberta", "modernbert", "bart", "whisper", "vit")
"""What runs under autocast too, beside every decoder."""

VARIANTS: tuple[Variant, ...] = (
    *(variant for row in ROWS for variant in row.variants()),
    *(variant for row in ROWS if row in DECODERS or row.name in MIXED for variant in row.mixed()),
)
