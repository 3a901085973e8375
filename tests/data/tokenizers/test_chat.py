"""Chat templates: ids and masks equal transformers', and a message cannot contain a special token."""

import json
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizers.chat import BUILT_IN, Chat, ChatTemplate, find_template, prepare_tokenizer
from data.tokenizers.llama2c import SPECIAL, tokenizer_json
from data.tokenizers.load import load_tokenizer
from data.tokenizers.tokenizer import END_OF_TEXT
from data.tokenizers.transfer import token_rows
from data.train_tokenizer import train
from eval.chat_format import open_chat_format
from util.errors import UserError

PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# As in Qwen3's template: earlier replies lose their reasoning, and the last one gets an empty one.
QWEN3 = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ALPACA = (
    "{% for m in messages %}### {{ {'system': 'System', 'user': 'Instruction', 'assistant': 'Response'}[m.role] }}:\n"
    "{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DIRECT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = {**BUILT_IN, "phi3": PHI3, "mistral": MISTRAL, "qwen3": QWEN3, "alpaca": ALPACA, "marked": MARKED}
WORDS = [
    "The cat",
    " sat",
    "\n",
    "\n\n",
    "  ",
    " ",
    "naïve",
    "👩‍👩‍👧",
    "東京",
    "x = {1: 2}",
    "'ll",
    "123",
    "<",
    "|",
    "a" * 9,
]
TEXT = "The cat sat on the mat.\n\nuser\nassistant\nsystem naïve 東京 x = {1: 2} she'll\n" * 20


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A byte-level tokenizer, and SentencePiece ones that put a space before each piece of text, or only the first."""
    folder = tmp_path_factory.mktemp("bases")
    trained = json.loads(train(iter([TEXT]), 400, [END_OF_TEXT], "gpt4").to_str())
    found = {"bytelevel": write(folder / "bytelevel", {"tokenizer.json": trained})}
    learned = [" t", "he", " the", " ", *"theasucrniomxy\n:#"]
    pieces = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *learned]
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    data = tokenizer_json({piece: -float(i) for i, piece in enumerate(pieces)})
    found["sentencepiece"] = write(folder / "sentencepiece", {"tokenizer.json": data, "tokenizer_config.json": config})
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    data = data | {"normalizer": None, "pre_tokenizer": metaspace}
    found["metaspace"] = write(folder / "metaspace", {"tokenizer.json": data, "tokenizer_config.json": config})
    return found


@pytest.fixture(scope="module")
def prepared(bases, tmp_path_factory):
    """Makes a Chat and transformers' tokenizer from the files that rawgpt writes for it."""
    folder = tmp_path_factory.mktemp("prepared")

    @cache
    def make(base, template):
        from transformers import AutoTokenizer

        (folder / f"{template}.jinja").write_text(TEMPLATES[template])
        found = find_template(template if template in BUILT_IN else str(folder / f"{template}.jinja"), bases[base])
        path = folder / base / template
        tokenizer, files = prepare_tokenizer(bases[base], found, path)
        assert write(path, files).fingerprint == tokenizer.fingerprint
        return Chat(tokenizer, find_template("", tokenizer)), AutoTokenizer.from_pretrained(path)

    return make


def conversation(rng, turns=None, system=None):
    def text():
        return "".join(rng.choices(WORDS, k=rng.randrange(9)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 and system is not False else []
    for _ in range(turns or rng.randrange(1, 4)):
        messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": "Well" + text()}]
    return messages


def by_transformers(theirs, messages, **options):
    found = theirs.apply_chat_template(messages, return_dict=True, **options)
    return found["input_ids"]


@pytest.mark.parametrize("base", ["bytelevel", "sentencepiece", "metaspace"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_ids_are_those_of_transformers(prepared, base, template):
    ours, theirs = prepared(base, template)
    rng = random.Random(template)
    for _ in range(500 if base == "bytelevel" else 50):
        messages = conversation(rng, system=template != "mistral")
        assert ours.encode(messages)[0] == by_transformers(theirs, messages)
        asked = messages[:-1]
        assert ours.encode_prompt(asked) == by_transformers(theirs, asked, add_generation_prompt=True)


@pytest.mark.parametrize("base", ["bytelevel", "sentencepiece", "metaspace"])
def test_the_mask_is_that_of_transformers(prepared, base):
    """The template with marks gives the mask of transformers, and the one without marks gives the same."""
    marked, theirs = prepared(base, "marked")
    plain, _ = prepared(base, "chatml")
    rng = random.Random(base)
    for _ in range(100):
        messages = conversation(rng)
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, counted = marked.encode(messages)
        assert (ids, [int(c) for c in counted]) == (found["input_ids"], found["assistant_masks"])
        assert plain.encode(messages) == (ids, counted)


def counted_text(chat, messages):
    """Returns the text of the counted tokens, with | between runs of them."""
    ids, counted = chat.encode(messages)
    runs, before = [], False
    for i, is_counted in zip(ids, counted, strict=True):
        if is_counted:
            runs = [*runs[:-1], [*runs[-1], i]] if before else [*runs, [i]]
        before = is_counted
    return [chat.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    "template, first, last",
    [
        ("chatml", "Yes<|im_end|>", "No<|im_end|>"),
        ("llama3", "Yes<|eot_id|>", "No<|eot_id|>"),
        ("phi3", "Yes<|end|>", "No<|end|>"),
        ("mistral", "Yes<|endoftext|>", "No<|endoftext|>"),
        ("qwen3", "Yes<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>"),
        ("alpaca", "Yes\n\n", "No\n\n"),
    ],
)
def test_each_reply_and_the_token_that_ends_it_are_counted(prepared, template, first, last):
    chat = prepared("bytelevel", template)[0]
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [
        {"role": role, "content": content}
        for role, content in zip(roles, ("Is it?", "Yes", "Sure?", "No", "Why?"), strict=True)
    ]
    assert counted_text(chat, messages[:4]) == [first, last]
    if template != "qwen3":
        assert counted_text(chat, messages) == [first, last]


@pytest.mark.parametrize(
    "template, text, token",
    [
        ("chatml", "", "<|im_end|>"),
        ("llama3", "", "<|eot_id|>"),
        ("phi3", "", "<|end|>"),
        ("mistral", "", "<|endoftext|>"),
        ("qwen3", "", "<|im_end|>"),
        ("marked", "", "<|im_end|>"),
        ("alpaca", "\n\n### Instruction:", None),  # without a token, the beginning of the next turn is the end
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}", "\n", "<|user|>"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "", None),
        ("{{ messages[3].role }}{% for m in messages %}{{ m.content }}<|a|>{% endfor %}", "", "<|a|>"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "", None),
    ],
)
def test_where_a_reply_ends(prepared, bases, tmp_path, template, text, token):
    if template in TEMPLATES:
        chat = prepared("bytelevel", template)[0]
    else:
        tokenizer, _ = prepare_tokenizer(bases["bytelevel"], ChatTemplate("t", template), tmp_path)
        chat = Chat(tokenizer, ChatTemplate("t", template))
    assert chat.end_of_reply() == (text, chat.tokenizer.special[token] if token else None)
    assert chat.unknown_names() == []


@pytest.mark.parametrize("base", ["bytelevel", "sentencepiece", "metaspace"])
@pytest.mark.parametrize("template", ["chatml", "llama3", "phi3", "mistral", "marked", "direct"])
def test_the_tokens_of_a_reply_decode_to_its_text(prepared, bases, tmp_path, base, template):
    """Also where the tokenizer inserts a space before the first word of a reply."""
    if template == "direct":  # a reply follows a special token
        tokenizer, _ = prepare_tokenizer(bases[base], ChatTemplate("direct", DIRECT), tmp_path)
        chat = Chat(tokenizer, ChatTemplate("tokenizer", DIRECT))
    else:
        chat = prepared(base, template)[0]
    form = open_chat_format("", None, chat.tokenizer, {}, chat.tokenizer.name)
    for text in (
        "The cat",
        "cat" if template == "llama3" else " cat",
        "naïve 東京\n\nx = {1: 2}",
        "a" * 9,
        "👩‍👩‍👧",
        "x <|im_end|> y",
    ):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        ids, prompt = chat.encode(messages)[0], form.encode(messages[:1])
        assert ids[: len(prompt)] == prompt
        stream = form.stream(prompt)
        found = "".join(stream.add(i) for i in ids[len(prompt) :])
        assert stream.ended and form.message(found)["content"] == text


def test_the_names_of_a_template_that_the_tokenizer_lacks_are_text(bases):
    chat = Chat(bases["bytelevel"], ChatTemplate("chatml", BUILT_IN["chatml"]))
    assert chat.unknown_names() == ["<|im_end|>", "<|im_start|>"]
    assert chat.end_of_reply() == ("<|im_end|>", None)


def test_the_end_of_text_token_is_none_that_the_template_writes(prepared, bases):
    """It separates conversations, so it must not occur within one."""
    expected = {"chatml": END_OF_TEXT, "phi3": "<|end_of_text|>", "mistral": "<|end_of_text|>"}
    for template, end in expected.items():
        tokenizer = prepared("bytelevel", template)[0].tokenizer
        assert tokenizer.special[end] == tokenizer.end_of_text
    spiece = prepared("sentencepiece", "mistral")[0].tokenizer  # whose </s> ends a turn
    assert spiece.special[END_OF_TEXT] == spiece.end_of_text == bases["sentencepiece"].vocab_size


def test_a_model_whose_end_of_text_token_ends_turns_keeps_its_embeddings(tmp_path):
    """As in the chat models of Qwen, whose base models separate documents by another token."""
    data = json.loads(train(iter([TEXT]), 300, [END_OF_TEXT, "<|im_start|>", "<|im_end|>"], "gpt4").to_str())
    config = {"eos_token": "<|im_end|>", "chat_template": BUILT_IN["chatml"]}
    old = write(tmp_path, {"tokenizer.json": data, "tokenizer_config.json": config})
    new, files = prepare_tokenizer(old, find_template("", old), tmp_path)
    assert (old.end_of_text, new.end_of_text) == (2, 0) and files["tokenizer.json"] == old.files["tokenizer.json"]
    ids, offsets = token_rows(old, new, 300, 300)
    assert ids.tolist() == [*range(300)] and offsets.tolist() == [*range(301)]


forged = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n", "user", "<|im_<|im_end|>end|>", "<|", "x"])
).map("".join)


@settings(max_examples=100, deadline=None)
@given(asked=forged, reply=forged)
def test_a_message_cannot_contain_a_special_token(prepared, asked, reply):
    chat = prepared("bytelevel", "chatml")[0]
    tokenizer = chat.tokenizer
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    ids, counted = chat.encode([{"role": "user", "content": asked}, {"role": "assistant", "content": "a" + reply}])
    assert [i for i in ids if i in tokenizer.special.values()] == [start, end, start, end]
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\na{reply}<|im_end|>\n"
    assert tokenizer.decode([i for i, c in zip(ids, counted, strict=True) if c]) == f"a{reply}<|im_end|>"


def test_added_tokens_that_are_not_special_are_found_in_messages(bases, tmp_path):
    data = json.loads(bases["bytelevel"].files["tokenizer.json"])
    for i, name in enumerate(("<think>", "</think>", "<user>"), 400):
        data["added_tokens"].append({**data["added_tokens"][0], "id": i, "content": name, "special": False})
    template = "{% for m in messages %}{% if m.role == 'user' %}<user>{% endif %}{{ m.content }}{% endfor %}"
    config = {"eos_token": END_OF_TEXT, "chat_template": template}
    tokenizer = write(tmp_path, {"tokenizer.json": data, "tokenizer_config.json": config})
    chat = Chat(tokenizer, find_template("", tokenizer))
    ids = chat.encode([{"role": "user", "content": "<think><user>"}])[0]
    assert ids.count(400) == 1 and ids.count(402) == 1  # the second <user> would begin a turn


def test_a_tokenizer_folder_has_its_own_template(bases, tmp_path):
    files = bases["bytelevel"].files
    write(tmp_path, files)
    assert find_template("", load_tokenizer(str(tmp_path))).name == "chatml"
    many = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config = json.loads(files["tokenizer_config.json"])
    tokenizer = write(tmp_path, {"tokenizer_config.json": config | {"chat_template": many}})
    assert find_template("", tokenizer) == ChatTemplate("tokenizer", "yes")
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert find_template("tokenizer", load_tokenizer(str(tmp_path))).source == "newer"
    assert find_template("chatml", load_tokenizer(str(tmp_path))).source == BUILT_IN["chatml"]
    (tmp_path / "other.json").write_text(json.dumps({"chat_template": "from JSON"}))
    assert find_template(str(tmp_path / "other.json"), tokenizer).source == "from JSON"


def test_the_date_of_a_template_is_always_the_same(bases, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d %b %Y') }}{{ {'a': ['é']} | tojson }}")
    assert find_template(str(tmp_path / "t.jinja"), bases["bytelevel"]).render([], {}) == '26 Jul 2024{"a": ["é"]}'


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ nothing.at.all }}", "the chat template fails .*'nothing' is undefined"),
        ("{{ raise_exception('never') }}", "the chat template fails .never"),
        (" ", "empty, or not one text"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(bases, tmp_path, source, message):
    (tmp_path / "t.jinja").write_text(source)
    with pytest.raises(UserError, match=f"--chat_template=.*{message}") as error:
        find = find_template(str(tmp_path / "t.jinja"), bases["bytelevel"])
        prepare_tokenizer(bases["bytelevel"], find, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("choice, message", [("chatlm", "did you mean chatml"), ("tokenizer", "has no chat template")])
def test_a_template_that_does_not_exist_is_one_line(bases, choice, message):
    with pytest.raises(UserError, match=message):
        find_template(choice, bases["bytelevel"])


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}", "message 2 begins"),
        ("{{ messages | length }}{% for m in messages %}<|a|>{{ m.content }}<|b|>{% endfor %}", "mark the replies"),
        (
            "{% for m in messages %}{{ m.content }} {% endfor %}"
            "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            "message 2 begins and ends",
        ),
    ],
)
def test_a_template_that_hides_the_replies_is_one_line(bases, tmp_path, template, message):
    tokenizer, _ = prepare_tokenizer(bases["bytelevel"], ChatTemplate("t", template), tmp_path)
    chat = Chat(tokenizer, ChatTemplate("t", template))
    with pytest.raises(ValueError, match=message):
        chat.encode([{"role": role, "content": "hello"} for role in ("user", "assistant") * 2])
