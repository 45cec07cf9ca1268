"""The tokenizer of this folder for transformers: a SentencePiece model behind a text transform."""

import os
import shutil

import sentencepiece
from transformers import PreTrainedTokenizer

from .golf_transforms import TRANSFORMS


class GolfTokenizer(PreTrainedTokenizer):
    """Ids of texts, each behind the token that begins a document."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, transform="none", **others):
        self.vocab_file = vocab_file
        self.transform = transform
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        others.setdefault("bos_token", self.pieces.id_to_piece(1))
        others.setdefault("unk_token", self.pieces.id_to_piece(self.pieces.unk_id()))
        super().__init__(transform=transform, **others)

    @property
    def vocab_size(self):
        return self.pieces.vocab_size()

    def get_vocab(self):
        return {self.pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text, **others):
        return self.pieces.encode(TRANSFORMS[self.transform].encode(text), out_type=str)

    def _convert_token_to_id(self, token):
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.pieces.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        text = self.pieces.decode(tokens).replace("▁", " ")
        decode = TRANSFORMS[self.transform].decode
        try:
            return text if decode is None else decode(text)
        except ValueError:  # a model may write an operator where none can be
            return text

    def build_inputs_with_special_tokens(self, first, second=None):
        begin = [self.bos_token_id]
        return begin + first if second is None else begin + first + begin + second

    def save_vocabulary(self, folder, filename_prefix=None):
        name = (filename_prefix + "-" if filename_prefix else "") + "tokenizer.model"
        path = os.path.join(folder, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copy(self.vocab_file, path)
        return (path,)
