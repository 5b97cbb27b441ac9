"""Which model a vector of a collection belongs to, and what follows from it. Pure.

A vector may be bound to a model when the collection is made:

    "vectors": {"size": 384, "distance": "Cosine", "shoal_model": "all-MiniLM-L6-v2"}
    "metadata": {"shoal_models": {"title": "all-MiniLM-L6-v2"}}      for clients that check fields; ""
                                                                    is the unnamed vector
Then texts for another model are refused there, and so are vectors that the header `shoal-model` says
are another's. The fingerprint of the model's weights is written down when the first text is embedded,
or at once if it is known; a model of the same name with other weights is refused from then on, since
its vectors would be compared with ones that mean something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue

from shoal.api.models import CreateCollection
from shoal.encoder_api import ModelInfo, resolve_model
from shoal.errors import BadRequest
from shoal.metadata.schema import BoundModel, named_vectors

__all__ = ["METADATA_KEY", "bound_models", "check_declared", "check_text", "means"]

METADATA_KEY = "shoal_models"


def bound_models(request: CreateCollection, known: Sequence[ModelInfo]) -> dict[str, BoundModel]:
    """Vector -> the model that it is bound to. Raises BadRequest for what cannot be."""
    vectors = named_vectors(request)
    wanted = _from_metadata(request.metadata or {}, vectors)
    for name, params in vectors.items():
        if params.shoal_model is not None:
            if wanted.get(name, params.shoal_model) != params.shoal_model:
                raise BadRequest(
                    f"Wrong input: the vector '{name}' is bound to {params.shoal_model} in its own "
                    f"settings and to {wanted[name]} in `metadata.{METADATA_KEY}`: name one"
                )
            wanted[name] = params.shoal_model
    bound = {}
    for name, model in wanted.items():
        weights = _weights(model, known)
        fitting = [info for info in weights if info.dim == vectors[name].size]
        if weights and not fitting:
            raise BadRequest(
                f"Wrong input: the vector '{name}' has {vectors[name].size} dimensions and the model "
                f"{weights[0].name} makes {weights[0].dim}"
            )
        fingerprints = {info.fingerprint for info in fitting}
        bound[name] = BoundModel(
            model=_full(model, known),
            # Of several weights none is chosen by chance: the first text is refused until one is left.
            fingerprint=fingerprints.pop() if len(fingerprints) == 1 else None,
        )
    return bound


def _from_metadata(metadata: Mapping[str, JsonValue], vectors: Iterable[str]) -> dict[str, str]:
    given = metadata.get(METADATA_KEY)
    if given is None:
        return {}
    names = set(vectors)
    if not isinstance(given, dict) or not given.keys() <= names:
        raise BadRequest(
            f"Wrong input: `metadata.{METADATA_KEY}` maps names of dense vectors to models; this "
            f"collection has {sorted(names)}"
        )
    found = {}
    for name, model in given.items():
        if not isinstance(model, str) or not model:
            raise BadRequest(
                f"Wrong input: `metadata.{METADATA_KEY}` should name a model for '{name}'"
            )
        found[name] = model
    return found


def check_text(
    bound: BoundModel | None, vector: str, model: str, known: Sequence[ModelInfo]
) -> None:
    """Raises BadRequest when a text for `model` must not become this vector."""
    if bound is not None and not _is(bound.model, model, known):
        raise BadRequest(
            f"Wrong input: the vector '{vector}' is bound to the model {bound.model}, and the text "
            f"names {model}: vectors of different models cannot be compared"
        )


def check_declared(
    bound: Mapping[str, BoundModel],
    vectors: Iterable[str],
    declared: str,
    known: Sequence[ModelInfo],
) -> None:
    """declared: a model's name or fingerprint, for the vectors of those names. Raises BadRequest."""
    for name in vectors:
        to = bound.get(name)
        if to is None or means(to, declared, known):
            continue
        raise BadRequest(
            f"Wrong input: the vector '{name}' is bound to the model {to.model} with the fingerprint "
            f"{to.fingerprint or '(not known yet)'}, and the request says that its vectors are of "
            f"{declared}: vectors of different models cannot be compared"
        )


def means(bound: BoundModel, given: str, known: Sequence[ModelInfo]) -> bool:
    """given: a model's name or fingerprint."""
    return given == bound.fingerprint or _is(bound.model, given, known)


def _is(bound: str, given: str, known: Sequence[ModelInfo]) -> bool:
    """Whether both names are of one model. An alias is understood while nobody serves it, too: a group
    that is lost for a moment must not make its texts wrong ones."""
    full_name, other = _full(bound, known), _full(given, known)
    unknown = not _weights(given, known)
    return full_name == other or (unknown and other == full_name.rpartition("/")[2])


def _full(model: str, known: Sequence[ModelInfo]) -> str:
    weights = _weights(model, known)
    return weights[0].name if weights else _plain(model)


def _weights(model: str, known: Sequence[ModelInfo]) -> list[ModelInfo]:
    """Those that are served under the name; none when nobody does at the moment."""
    try:
        name = resolve_model(model, {info.name: info.aliases for info in known})
    except BadRequest:
        return []
    return [info for info in known if info.name == name]


def _plain(model: str) -> str:
    return model.strip().lower()
