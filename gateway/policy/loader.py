"""Load a policy by name: a built-in one, or any function of the same signature."""

from __future__ import annotations

import inspect
from importlib import import_module
from math import isfinite

from msgspec.structs import replace

from gateway.policy.builtin import BUILT_IN
from gateway.policy.interface import Policy, PolicyView, SlotFacts, Verdict
from shared.errors import SettingsError
from shared.logs import get_logger
from shared.messages.offers import BareOffer, DecisionKind

log = get_logger()


def load_policy(name: str) -> Policy:
    """Return a built-in policy by name, or load `module:function`. Raises SettingsError with the cause."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        known = ", ".join(BUILT_IN)
        raise SettingsError(f"unknown policy {name!r}: it is {known}, or module:function")
    try:
        policy = getattr(import_module(module), function)
    except Exception as error:  # a custom module may raise anything on import
        raise SettingsError(f"policy {name!r} can't be imported: {type(error).__name__}: {error}") from error
    if not callable(policy) or inspect.iscoroutinefunction(policy):
        raise SettingsError(f"policy {name!r} must be a plain function (BareOffer, PolicyView) -> Verdict")
    try:
        inspect.signature(policy).bind(None, None)
    except TypeError as error:
        raise SettingsError(f"policy {name!r} must take two arguments, offer and view: {error}") from error
    except ValueError:  # a builtin without a signature
        pass
    return _guarded(name, policy)


def _guarded(name: str, policy: Policy) -> Policy:
    """Wrap a custom policy: its mistakes refuse the offer, and never give a busy slot away."""

    def judge(offer: BareOffer, view: PolicyView) -> Verdict:
        try:
            verdict: object = policy(offer, view)
        except Exception as error:
            log.exception("custom policy failed on an offer", policy=name, task=offer.task_id)
            return _refused(name, f"{type(error).__name__}: {error}")
        if not isinstance(verdict, Verdict):
            return _refused(name, f"it returned a {type(verdict).__name__}, not a Verdict")
        if verdict.slot is not None and not any(_is_free(facts, verdict.slot) for facts in view.slots):
            return _refused(name, f"it chose slot {verdict.slot!r}, which is not free")
        if verdict.priority is not None and not isfinite(verdict.priority):
            return _refused(name, f"its priority is {verdict.priority}")
        return replace(verdict, policy=name, kind=DecisionKind(verdict.kind))

    return judge


def _is_free(facts: SlotFacts, slot: str) -> bool:
    return facts.slot == slot and not facts.busy and facts.open


def _refused(name: str, why: str) -> Verdict:
    return Verdict(reason=f"Policy {name} failed: {why}", policy=name)
