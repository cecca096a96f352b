"""The tree of errors; each says what happened, where, and what to do next.

HedgerowError
├── SettingsError            a setting is wrong, misspelt or missing
├── DataError                the device's own data cannot be used as it is
├── WireError                what arrived cannot be what was meant
│   ├── FrameTooLarge        over the bound that was agreed
│   ├── FrameCorrupt         truncated, wrong digest, wrong header, not finite
│   ├── FrameMismatch        well-formed, but not the shapes, run, round or sender asked for
│   └── SealBroken           a letter is not from whom its topic says
│       ├── NotSealed        no seal where one is needed
│       ├── SealWrong        another key made it, or the letter was changed
│       ├── Replayed         it came before
│       └── NotEnrolled      a device that never joined, or was revoked
├── TransportError           the broker or the link
│   ├── NotConnected         no broker within the deadline
│   ├── PublishRefused       the broker says no to a letter
│   └── DeliveryFailed       the other side did not take the frame in time, or refused it
├── JoinRefused              a device may not join, or the other side cannot prove who it is
├── RoundError
│   └── QuorumMissed         too few updates when the round's deadline passed
├── WorkRefused              this agent cannot or will not do what it was asked
├── SensorError              an energy source failed
├── ExportError
│   ├── ProofFailed          the artifact does not give the answers the trained model gave
│   ├── FormRefused          another device's, outside data, foreign operators, another opset
│   └── SignatureError       a key cannot be used
│       ├── Unsigned         no signature where keys ask for one
│       ├── UnknownSigner    signed with a key that is not trusted
│       └── SignatureWrong   the signature does not fit the files
└── StoreError               the coordinator's memory
"""

from __future__ import annotations


class HedgerowError(Exception):
    """Root of all errors Hedgerow raises on purpose."""


class SettingsError(HedgerowError):
    """A setting is wrong, misspelt or missing."""


class DataError(HedgerowError):
    """The device's own data cannot be used as it is."""


class WireError(HedgerowError):
    """What arrived cannot be what was meant."""


class UnknownVerb(WireError):  # noqa: N818
    """A command of a newer version; `verb` and `id` are what could be read of it."""

    def __init__(self, verb: str, id: str) -> None:
        super().__init__(f"this agent does not know the command {verb!r}: install a newer version on it")
        self.verb, self.id = verb, id


class FrameTooLarge(WireError):  # noqa: N818 - named for what happened, as in the house's tree
    """A frame, header or part is over its bound."""


class FrameCorrupt(WireError):  # noqa: N818
    """A frame is truncated, has a wrong digest or header, or values that are not finite."""


class FrameMismatch(WireError):  # noqa: N818
    """A well-formed frame that is not for this run, round, sender or model."""


class SealBroken(WireError):  # noqa: N818
    """A letter is not from whom its topic says."""


class NotSealed(SealBroken):
    """A letter has no seal where one is needed."""


class SealWrong(SealBroken):
    """Another key made the seal, or the letter was changed."""


class Replayed(SealBroken):
    """A letter came before."""


class NotEnrolled(SealBroken):
    """The device never joined, or was revoked."""


class JoinRefused(HedgerowError):  # noqa: N818
    """A device may not join, or the other side cannot prove who it is."""


class TransportError(HedgerowError):
    """The broker or the link failed."""


class NotConnected(TransportError):  # noqa: N818
    """There is no connection to the broker within the deadline."""


class PublishRefused(TransportError):  # noqa: N818
    """The broker said no to a letter: its access list, a quota; the message names the topic."""


class DeliveryFailed(TransportError):  # noqa: N818
    """The other side did not take a frame in time, or (`refused`) said why it will not."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class RoundError(HedgerowError):
    """A round cannot go on."""


class QuorumMissed(RoundError):  # noqa: N818
    """Too few updates were in when the round's deadline passed."""


class WorkRefused(HedgerowError):  # noqa: N818
    """This agent cannot or will not do what it was asked; the message is the reason."""


class SensorError(HedgerowError):
    """An energy source failed."""


class ExportError(HedgerowError):
    """An artifact could not be written."""


class ProofFailed(ExportError):  # noqa: N818
    """An artifact does not give the answers that the trained model gave."""


class FormRefused(ExportError):  # noqa: N818
    """A model file is not of the form that is run here: self-contained, standard operators, its own opset."""


class SignatureError(ExportError):
    """A signature or a key cannot be used."""


class Unsigned(SignatureError):  # noqa: N818
    """An artifact has no signature, and there are keys that ask for one."""


class UnknownSigner(SignatureError):  # noqa: N818
    """An artifact is signed with keys that are not trusted here."""


class SignatureWrong(SignatureError):  # noqa: N818
    """A signature does not fit the files it is beside."""


class StoreError(HedgerowError):
    """The coordinator's memory failed."""
