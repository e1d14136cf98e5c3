"""How a client waits for what the service does later."""

from __future__ import annotations

from serve.client_errors import UnavailableError
from serve.client_exchange import Call, RetryPolicy, Steps, Wait, exchange
from serve.submission_api import Submission

_FIRST_S, _LONGEST_S, _LEAST_S = 0.2, 5.0, 0.05


def until_finished(
    call: Call[Submission], policy: RetryPolicy, request_timeout_s: float, timeout_s: float
) -> Steps[Submission]:
    """Asks for a submission, less and less often, until it is done or failed.

    Raises:
        DermrayError: a request failed; UnavailableError "timeout" when `timeout_s` are over.
    """
    deadline, pause_s = policy.clock() + timeout_s, _FIRST_S
    left = timeout_s
    while True:
        found = yield from exchange(call, policy, min(request_timeout_s, max(left, _LEAST_S)))
        if found.state in ("done", "failed"):
            return found
        left = deadline - policy.clock()
        if left < _LEAST_S:
            raise UnavailableError(
                None, "timeout", f"submission {found.submission_id} is {found.state} after {timeout_s:g} s"
            )
        yield Wait(min(pause_s, left / 2))
        pause_s = min(pause_s * 1.5, _LONGEST_S)
        left = deadline - policy.clock()
