"""A conversation with a fine-tuned model in the terminal: `python eval/chat.py --checkpoint RUN_OR_CHECKPOINT`.

--once "QUESTION" prints one reply and exits. If stdin is not a terminal, its whole text is the question.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import cli
from eval.prompts import utf8
from util.command import parse_first
from util.errors import CommandParser, UserError, closest, quote, run_command

HELP = {
    "/reset": "forget the conversation, but not the system message",
    "/save": "write the conversation to a new file; /save FILE.jsonl appends it to that file",
    "/quit": "end, as does Ctrl-D",
    "/help": "list these commands",
}


def parser() -> CommandParser:
    """Returns the parser of the command line."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="an output_dir, one checkpoint in it, or hf:FOLDER_OR_NAME, ...")
    add("--tokenizer", default="", help="name, or path of a tokenizer.json (default: the model's own)")
    cli.add_template_flag(parser)
    add("--system", default="", type=utf8("--system"), metavar="TEXT", help="the system message")
    add("--once", type=utf8("--once"), metavar="QUESTION", help="print the reply to one question, and exit")
    add(
        "--bos",
        type=int,
        choices=[0, 1],
        help="1: put the end-of-text token before the conversation; 0: do not (default: as in training)",
    )
    cli.add_sampling_flags(parser, max_new_tokens=1024)
    return parser


def read_flags() -> argparse.Namespace:
    """Parses and checks the command line. Reads the question from stdin if it is not a terminal."""
    args = parser().parse_args()
    cli.check_sampling(args, "eval/chat.py")
    args.place = "--once" if args.once is not None else "stdin"
    if args.once is None and not sys.stdin.isatty():
        try:
            args.once = sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as e:
            raise UserError(f"stdin: not UTF-8 at byte {e.start}; convert it first") from e
    if args.once is not None and not args.once.strip():
        raise UserError(f"{args.place}: the question is empty; give a text")
    return args


# Before torch is imported, so that --help and typos are answered at once.
args = parse_first(__name__, read_flags)

import torch

from eval.chat_format import open_chat_format
from eval.conversation import Conversation
from eval.generate import Sampling
from eval.model import load_model_tokenizer
from eval.save_chat import save
from model.formats.pretrained import load_model
from util.device import choose_device


def print_note(text: str) -> None:
    """Prints a line that is not part of a reply."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def show_reply(conversation: Conversation, ids: list[int], stop: list[str], parts: list[str]) -> bool:
    """Prints a reply while it is generated, and appends its text to `parts`. Returns whether it reached its end."""
    stream = conversation.chat_format.stream(ids, stop)
    for token in conversation.reply(ids):
        parts.append(stream.add(token))
        print(parts[-1], end="", flush=True)
        if stream.ended:
            return True
    parts.append(stream.finish())
    print(parts[-1], end="", flush=True)
    return False


def ask(conversation: Conversation, question: str, place: str) -> list[int]:
    """Returns the ids after which the model replies. Errors begin with `place`. Reports dropped turns."""
    before = conversation.dropped
    try:
        ids = conversation.ask(question)
    except ValueError as e:
        raise UserError(f"{place}{e}") from e
    if (dropped := conversation.dropped - before) > 0:
        turns = "turn no longer fits" if dropped == 2 else f"{dropped // 2} turns no longer fit"
        print_note(f"the oldest {turns} into the context of {conversation.limit:,} tokens; the model does not see them")
    return ids


def answer(conversation: Conversation, question: str, ids: list[int], stop: list[str]) -> None:
    """Prints the reply to a question and adds both to the conversation. Ctrl-C stops the reply."""
    parts: list[str] = []
    ended = interrupted = False
    try:
        ended = show_reply(conversation, ids, stop, parts)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    if interrupted and not "".join(parts):
        print_note("stopped before the reply began; the message is forgotten")
        return
    conversation.add(question, "".join(parts))
    if interrupted:
        print_note("stopped")
    elif not ended:
        print_note(conversation.end_reason(ids))


# --- the terminal ---------------------------------------------------------------------------------


def read_line() -> str | None:
    """Reads a line from the terminal. Returns None at the end of the input (Ctrl-D)."""
    try:
        return input("> ")
    except UnicodeDecodeError:
        print_note("the line is not UTF-8")
        return ""
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        raise


def run_slash_command(line: str, conversation: Conversation) -> bool:
    """Executes a line that begins with "/". Returns whether the conversation continues."""
    name, _, rest = line.partition(" ")
    if name not in HELP or (rest.strip() and name != "/save"):
        near = None if name in HELP else closest(name, HELP)
        hint = f"did you mean {near}? " if near else ""
        what = f"{name} takes no argument" if name in HELP else f"unknown command {quote(name)}"
        print_note(f"{what}; {hint}/help lists the commands, and a space before / makes the line a message")
    elif name == "/help":
        print("\n".join(f"{command:8}{text}" for command, text in HELP.items()))
    elif name == "/reset":
        conversation.reset()
        print_note("the conversation is forgotten")
    elif name == "/save":
        try:
            print_note(f"saved as a row of {save(conversation.messages, rest.strip())}")
        except UserError as e:
            print_note(str(e))
    return name != "/quit" or bool(rest.strip())


def converse(conversation: Conversation, stop: list[str], read: Callable[[], str | None] = read_line) -> None:
    """Holds a conversation in the terminal until /quit or Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 (line editing for `input`)
    print_note("/help lists the commands; Ctrl-C stops a reply; Ctrl-D ends")
    while (line := read()) is not None:
        if line.startswith("/"):
            if not run_slash_command(line.strip(), conversation):
                return
        elif question := line.strip():
            try:
                answer(conversation, question, ask(conversation, question, "the message"), stop)
            except (UserError, FloatingPointError, torch.OutOfMemoryError) as e:  # the conversation is not lost
                print_note(str(e).partition("\n")[0])


def main(args: argparse.Namespace) -> None:
    """Loads the model, and replies to one question or holds a conversation."""
    device = choose_device(args.device)
    model, flags, found = load_model(args.checkpoint, device, lambda line: print(line, file=sys.stderr))
    tokenizer = load_model_tokenizer(args.tokenizer, found, flags)
    form = open_chat_format(args.chat_template, args.bos, tokenizer, flags, found)
    sampling, dtype = Sampling(args.temperature, args.top_k, args.top_p), getattr(torch, args.dtype)
    conversation = Conversation(model, form, args.system, args.max_new_tokens, sampling, args.seed)
    if args.system:  # fails now if the system message alone does not fit
        ask(conversation, "x", "--system")
    try:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if args.once is None:
                return converse(conversation, args.stop)
            ids = ask(conversation, args.once, args.place)
            ended = show_reply(conversation, ids, args.stop, [])
            print(flush=True)
            if not ended:
                print_note(conversation.end_reason(ids))
    except FloatingPointError as e:
        raise UserError(f"{found}: {e} in {args.dtype}; try --dtype=float32, or another checkpoint") from e
    except torch.OutOfMemoryError as e:
        raise UserError(f"{args.place}: out of memory; shorten it, or lower --max_new_tokens") from e


if __name__ == "__main__":
    run_command(lambda: main(args))
