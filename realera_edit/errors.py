"""The errors and the warning that callers may meet. Every message says what, where, and how to mend it."""

from __future__ import annotations


class RealEraError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with 1."""


class ConceptError(RealEraError):
    """The request itself is wrong: a concept, target, alias, preserve entry or concept file."""


class ConfigError(RealEraError):
    """An option's value is outside its range, or two options contradict each other."""


class EncodingError(RealEraError):
    """A prompt cannot be turned into the states that the pipeline would feed to its denoiser."""


class CheckpointError(RealEraError):
    """A model folder or weight file is missing, corrupt, unsupported, or cannot be written."""


class ProjectionError(RealEraError):
    """The projections that read the text were not found, or do not fit the text encoder."""


class SolveError(RealEraError):
    """The least-squares system could not be solved to a useful accuracy."""


class ReportError(RealEraError):
    """An evaluation folder cannot be read, or no report can be made of it."""


class HubError(RealEraError):
    """The Hugging Face hub was not reached, refused, or was asked for what it cannot do."""


class RealEraWarning(UserWarning):
    """The edit was made, but something about it deserves a look."""
