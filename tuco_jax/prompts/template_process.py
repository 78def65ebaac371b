"""Chat templates that may take all time or memory, in a process that can be ended.

    process = TemplateProcess()
    text = process.render(template, messages, ...)

The process has a limit on its memory where the system knows one (Linux, mostly; not Windows), and
is ended where an answer does not come in time. It starts when it is first needed, which takes a
second or two: for ordinary templates it is not (`template_limits.tame`). It ends with ours.
"""

import atexit
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from tuco_jax.prompts.template_limits import SECONDS, TooMuchError, most_characters

__all__ = ["RefusedError", "TemplateProcess", "main"]

_ROOT = pathlib.Path(__file__).parents[2]
_START, _MEMORY = 60.0, 1 << 30


class RefusedError(Exception):
    """What a template raised, as text."""


class TemplateProcess:
    """A process that renders one conversation after another, for any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def end(self) -> None:
        """End it; a later `render` starts another."""
        atexit.unregister(self.end)
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def render(self, job: Mapping[str, Any], characters: int, seconds: float = SECONDS) -> str:
        """The text of a job: arguments of transformers' `render_jinja_template`, one conversation.

        characters: of what the template reads. Raises TooMuchError or RefusedError.
        """
        with self._turn:
            return self._render(job, characters, seconds)

    def _render(self, job: Mapping[str, Any], characters: int, seconds: float) -> str:
        if self._process is not None and self._process.poll() is not None:  # an interrupt, say
            self.end()
        if self._process is None:
            atexit.register(self.end)
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import {__name__} as child; child.main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [_ROOT, *sys.path]))},
            )
            if self._ask(None, _START) is None:
                raise RefusedError("a process for it cannot be started")
        found = self._ask({"job": job, "most": most_characters(characters)}, seconds)
        if found is None:
            raise TooMuchError(f"it runs for more than {seconds:g} s, or takes all memory")
        if "text" in found:
            return found["text"]
        raise (TooMuchError if found.get("much") else RefusedError)(found["error"])

    def _ask(self, question: Any, seconds: float) -> Any:
        """The answer; None where it does not come in time, and then the process has ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        clock = threading.Timer(seconds, process.kill)
        clock.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:  # it ended
            answer = ""
        except BaseException:  # its answer would be taken for that to the next question
            self.end()
            raise
        finally:
            clock.cancel()
        if answer.endswith("\n"):
            return json.loads(answer)
        self.end()
        return None


def main() -> None:
    """Answer one line after another."""
    from transformers.utils.chat_template_utils import render_jinja_template

    sys.stdin.readline()
    _limit_memory()
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            text = render_jinja_template(**question["job"])[0][0]
            most = question["most"]
            answer: dict[str, Any] = {"text": text}
            if len(text) > most:
                answer = {"error": f"it makes more than {most} characters of them", "much": True}
        except MemoryError:
            answer = {"error": "it takes all memory", "much": True}
        except Exception as error:  # whatever a template raises
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, hard))
    except (ImportError, OSError, ValueError):  # a system without: the clock has to do
        pass
