"""Two futures of one live session: fork it, let both go on, keep the better one.

A fork shares the memory of its parent and costs the same however long the session is. Here the
user has stopped speaking; one future hears more speech, the other hears silence. Run it:
``python examples/fork_two_futures.py``.
"""

import itertools

import numpy as np

import tml_core as tml


def continue_with(session: tml.Session, chunks: list[tml.Chunk]) -> float:
    """Feed ``chunks``; the mean log-probability of what the model says, its own confidence."""
    logprobs = [
        event.logprob
        for chunk in chunks
        for event in session.append(chunk)
        if isinstance(event, tml.TextToken)
    ]
    return sum(logprobs) / max(1, len(logprobs))


def main() -> None:
    audio, _ = tml.media.clips()
    ticks = iter(tml.media.micro_turns(audio))
    session = tml.Session("nano", seed=0)
    for chunk in itertools.islice(ticks, 10):
        session.append(chunk).result()

    more_speech = [tml.Chunk(audio=one.audio) for one in itertools.islice(ticks, 5)]
    silence = [tml.Chunk(audio=np.zeros(3200, np.float32))] * 5
    futures = {
        "the user goes on": (session.fork(), more_speech),
        "the user is silent": (session.fork(), silence),
    }
    scores = {name: continue_with(fork, chunks) for name, (fork, chunks) in futures.items()}
    for name, score in scores.items():
        print(f"{name}: mean log-probability {score:.3f}")

    best = max(scores, key=lambda name: scores[name])
    session.close()
    for name, (fork, _) in futures.items():
        if name != best:
            fork.close()
    kept = futures[best][0]
    print(f"kept {best!r}: tick {kept.info().tick}, position {kept.info().position}")
    kept.close()


if __name__ == "__main__":
    main()
