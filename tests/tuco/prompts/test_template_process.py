"""A process for templates: its answers, its limits, and its end."""

import pytest

from tuco_jax.prompts.template_limits import TooMuchError
from tuco_jax.prompts.template_process import RefusedError, TemplateProcess


def job(template):
    return {
        "conversations": [[{"role": "user", "content": "hi"}]],
        "chat_template": template,
        "tools": None,
        "add_generation_prompt": False,
        "continue_final_message": False,
    }


def test_answers_limits_and_end():
    process = TemplateProcess()
    try:
        assert process._process is None  # until it is needed
        assert process.render(job("{{ messages[0].content }}!"), 2) == "hi!"
        first = process._process
        with pytest.raises(TooMuchError, match="makes more than 1000100 characters"):
            process.render(job("{{ 'a' * 2000000 }}"), 2)
        with pytest.raises(TooMuchError, match="all memory"):
            process.render(job("{{ 'a' * 99999999999 }}"), 2)
        with pytest.raises(RefusedError, match="no such turn"):
            process.render(job("{{ raise_exception('no such turn') }}"), 2)
        assert process._process is first
        with pytest.raises(TooMuchError, match="runs for more than 0.5 s"):
            process.render(job("{{ 9 ** (9 ** 9) }}"), 2, seconds=0.5)
        assert first is not None and first.poll() is not None
        assert process.render(job("again"), 2) == "again"
        second = process._process
    finally:
        process.end()
    assert second is not None and second.poll() is not None


def test_one_that_was_ended_or_interrupted_gives_no_old_answer(monkeypatch):
    process = TemplateProcess()
    try:
        assert process.render(job("a"), 2) == "a"
        assert process._process is not None
        process._process.kill()
        process._process.wait()
        assert process.render(job("b"), 2) == "b"

        def interrupted(*_: object):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(process._process.stdout, "readline", interrupted)
            process.render(job("c"), 2)
        assert process.render(job("d"), 2) == "d"
    finally:
        process.end()
