"""From a folder or hub id to a model that scores."""

from __future__ import annotations

import warnings
from pathlib import Path

from psykern.core.errors import NoSharingWarning, SlowDtypeWarning
from psykern.core.settings import Backend, Device, Dtype, Implementation, Settings
from psykern.engine.budgets import budgets
from psykern.engine.engine import Engine
from psykern.kernels.compute import Compute
from psykern.models.foreign.model import ForeignModel
from psykern.models.locate import Located, locate
from psykern.models.model import Model
from psykern.models.weights import Base, ModelFolder
from psykern.scoring.language import Language, decoder_spec
from psykern.scoring.scorer import Scorer


def check_model(model: object) -> None:
    """Raises TypeError for what is no name of a model, and no model that is loaded."""
    if not isinstance(model, (str, Path, Scorer)):
        raise TypeError(
            f"model: expected a folder or a hub id, got {type(model).__name__}; save the model and its tokenizer to a "
            "folder (save_pretrained of transformers does) and give that"
        )


def load(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    wave_tokens: int | None = None,
    batch_tokens: int | None = None,
    session_bytes: int | None = None,
    chat: bool = False,
    implementation: Implementation = "auto",
) -> Scorer:
    """A checkpoint, loaded to score whatever it is given, as often as wanted.

    model: a folder or a hub id; ``revision``: a branch, tag or commit of the latter, as ``owner/name@REVISION`` says
    too. ``adapter``: folder or hub id of a PEFT LoRA adapter, which is merged into it; a model that is an adapter's
    folder has the base that it names. Tokenizer and chat template are the adapter's where its folder holds a tokenizer.
    device: ``auto``, ``cpu``, ``cuda`` or one of several, ``cuda:1``. dtype: of the arithmetic, ``float32``,
    ``bfloat16`` or ``float16``; ``auto``: float32 on a CPU, bfloat16 on a GPU. backend: of the kernels.
    ``wave_tokens``, ``batch_tokens``: memory against speed, as in :class:`.Settings`. ``session_bytes``: memory for the
    keys and values of sessions, taken when the first one computes (on a CPU as it is used); None: 40 % of what is free
    then on a CPU, a quarter on a GPU, at most what 262,144 tokens need. ``chat``: a chat template will be needed, so
    say at once if there is none.

    On a CPU, weights that no file has as they are (quantised, or with an adapter) are made anew for each wave. From the
    first small call or session on they are kept, where they take no more than 40 % of what is free.

    implementation: ``native`` (as ``auto`` is), or ``transformers``: the library's own modules compute the layers of
    any causal language model that it has, with psykern's attention in them, so that common beginnings are computed
    once; where that cannot stand in, one pass for each sequence. The whole model is on the device then.

    Warns: SlowDtypeWarning where the processor has no fast products of bfloat16 and that is asked for, NoSharingWarning
    where transformers computes one pass for each sequence.
    Raises CheckpointError for a folder that cannot be used, BackendError for a device or backend that is not there,
    ValueError for a word that is none of these, TypeError for what is no name of a model.
    """
    check_model(model)
    if isinstance(model, Scorer):
        raise TypeError(f"model: {model.name} is loaded; use it as it is")
    if session_bytes is not None and session_bytes < 0:
        raise ValueError(f"session_bytes: expected a number of bytes, at least 0, got {session_bytes}")
    settings = Settings(
        device=device,
        dtype=dtype,
        backend=backend,
        wave_tokens=wave_tokens,
        batch_tokens=batch_tokens,
        implementation=implementation,
    )
    return open_scorer(locate(model, adapter, revision=revision), settings, session_bytes=session_bytes, chat=chat)


def open_scorer(
    located: Located,
    settings: Settings,
    *,
    base: ModelFolder | None = None,
    session_bytes: int | None = None,
    chat: bool = False,
) -> Scorer:
    """:func:`load` of what was located; ``base``: the one that is open, to be shared by several adapters."""
    compute = Compute.resolve(settings.device, settings.dtype, settings.backend)
    if caveat := compute.caveat:
        warnings.warn(caveat, SlowDtypeWarning, stacklevel=3)
    opened = base if isinstance(base, Base) else None
    spec = decoder_spec(located.base, settings.implementation) if opened is None else opened.spec
    language = Language.load(located.tokenizer, spec.vocab_size)
    if chat:
        language.chat  # noqa: B018
    decoder: Model | ForeignModel  # last, as it takes longest
    if settings.implementation == "transformers":
        decoder = ForeignModel(base or ModelFolder(located.base), compute, adapter=located.adapter)
        if decoder.spec.reason:
            warnings.warn(
                f"{located.name}: one pass per sequence, common beginnings again and again, because "
                f"{decoder.spec.reason}",
                NoSharingWarning,
                stacklevel=3,
            )
    else:
        decoder = Model(opened or located.base, compute, adapter=located.adapter)
    suitable = budgets(decoder.spec, compute.device, compute.dtype).under(settings)
    engine = Engine(decoder, session_bytes=session_bytes)
    return Scorer(located.name, located.base, decoder, language, engine, suitable, located.adapter)
