"""What a model does by itself decides: exact against the model's own plain forward, or refused with the true reason."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers as tf
from models import BACKENDS, make_model, shared_model
from oracles import dense, positions, relation
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import leattn
from leattn import BackendError, ICLNode, KVStore, causal, compile_prompt

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100}
FROM_PADDING_ON = ["roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "data2vec-text", "xmod", "xlm-roberta-xl"]
IDS = [5, 6, 7, 23, 75, 90, 54, 89, 46, 42, 13]


@pytest.fixture(autouse=True)
def _uncompiled_flex():
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def of(family, implementation="eager", **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, "initializer_range": 0.15, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def large(model, std=0.2):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def off(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def greedily(model, ids, count):
    """What the model writes by itself, each token from a plain forward of all before it."""
    written = list(ids)
    for _ in range(count):
        written.append(int(model(torch.tensor([written]), use_cache=False).logits[0, -1].argmax()))
    return written[len(ids) :]


class TestPositions:
    @pytest.mark.parametrize("family", FROM_PADDING_ON)
    def test_families_that_count_from_the_padding_id_on(self, family):
        options = {"default_language": "en_XX"} if family == "xmod" else {}
        model = of(family, is_decoder=True, pad_token_id=3, max_position_embeddings=40, **options)
        expected = model(torch.tensor([IDS]), use_cache=False).logits
        served = [backend for backend in BACKENDS if leattn.check_model(model)[backend].works]
        assert "eager" in served
        assert "sparse" in served
        for prompt in (compile_prompt(ICLNode(IDS)), compile_prompt(causal([IDS[:4], IDS[4:]]))):
            for backend in served:
                assert off(leattn.forward(model, prompt, backend=backend, use_cache=False).logits, expected) < 1e-5
            inputs = leattn.model_inputs(model, prompt)
            assert off(model(**inputs, use_cache=False).logits, expected) < 1e-5

    def test_their_parallel_nodes_stand_at_the_same_positions(self):
        model = of("roberta", is_decoder=True, pad_token_id=3, max_position_embeddings=40)
        root = ICLNode(IDS[:3])
        documents = [ICLNode(IDS[3:6], [root], id="a"), ICLNode(IDS[6:9], [root], id="b")]
        prompt = compile_prompt(documents)
        logits = leattn.forward(model, prompt, use_cache=False).logits[0]
        for document in documents:
            alone = model(torch.tensor([IDS[:3] + list(document.content)]), use_cache=False).logits[0, 3:]
            assert off(logits[slice(*prompt.spans[document])], alone) < 1e-5

    def test_they_decode_as_they_do_by_themselves(self):
        model = of("roberta", is_decoder=True, pad_token_id=3, max_position_embeddings=40, eos_token_id=None, bos_token_id=None)
        expected = greedily(model, IDS, 6)  # transformers' own generate counts from 0 here, unlike the model's forward
        for options in ({}, {"use_cache": False}, {"kv_store": KVStore()}):
            written = leattn.generate(model, compile_prompt(causal([IDS[:4], IDS[4:]])), max_new_tokens=6, **options)
            assert written.token_ids.tolist() == expected

    @pytest.mark.parametrize(
        ("family", "options", "limit"),
        [
            ("xglm", {"d_model": 48, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, 40),
            ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 4}, 40),
            ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48}, 40),
            ("roberta", {"is_decoder": True, "pad_token_id": 3}, 36),
            ("bert", {"is_decoder": True}, 40),
        ],
    )
    def test_a_table_is_used_to_its_end_and_not_past_it(self, family, options, limit):
        names = {"gpt2": "n_positions"}
        model = of(family, **options, **{names.get(family, "max_position_embeddings"): 40})
        assert leattn.check_model(model).facts.position_limit == limit
        last = compile_prompt(ICLNode([5, 6], start_pos_id=limit - 2))
        assert torch.isfinite(leattn.forward(model, last).logits).all()
        with pytest.raises(BackendError, match=f"the last position is {limit}, but .* has a table of {limit} positions"):
            leattn.forward(model, compile_prompt(ICLNode([5, 6], start_pos_id=limit - 1)))

    def test_the_last_new_token_is_not_fed(self):
        model = of("gpt2", n_embd=48, n_layer=2, n_head=4, n_positions=40, eos_token_id=None)
        prompt = compile_prompt(ICLNode([5, 6], start_pos_id=36))
        assert len(leattn.generate(model, prompt, max_new_tokens=3).token_ids) == 3  # feeds positions 36 to 39
        with pytest.raises(BackendError, match="the last position is 40 with 4 new tokens"):
            leattn.generate(model, prompt, max_new_tokens=4)


class TestCausality:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_an_encoder_is_no_decoder_on_any_backend(self, backend):
        model = tf.BertLMHeadModel(tf.BertConfig(**SMALL)).eval()
        words = r"its attention is not causal \(its config says is_decoder=False\), .*; load it with is_decoder=True"
        with pytest.raises(BackendError, match=words):
            leattn.forward(model, compile_prompt(ICLNode(IDS)), backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_attention_in_both_directions_by_config(self, backend):
        config = tf.Gemma3TextConfig(**SMALL, head_dim=12, num_key_value_heads=2, use_bidirectional_attention=True)
        model = tf.Gemma3ForCausalLM(config).eval()
        words = r"its config says use_bidirectional_attention=True\), .*; load it with use_bidirectional_attention=False"
        with pytest.raises(BackendError, match=words):
            leattn.forward(model, compile_prompt(ICLNode(IDS)), backend=backend)

    @pytest.mark.parametrize(
        "model",
        [
            lambda: of("bert", is_decoder=True),
            lambda: of("gemma3_text", head_dim=12, num_key_value_heads=2, use_bidirectional_attention=False),
        ],
    )
    def test_what_the_reasons_say_to_do_is_served(self, model):
        model = model()
        expected = model(torch.tensor([IDS]), use_cache=False).logits
        assert off(leattn.forward(model, compile_prompt(causal([IDS[:4], IDS[4:]])), use_cache=False).logits, expected) < 1e-5

    def paligemma(self, implementation):
        text = {**SMALL, "model_type": "gemma", "head_dim": 12, "num_key_value_heads": 2, "initializer_range": 0.15}
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
        config = tf.PaliGemmaConfig(text_config=text, vision_config={**vision, **sizes}, image_token_id=99, projection_dim=48)
        torch.manual_seed(0)
        return large(tf.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval())

    @pytest.mark.parametrize("backend", ["auto", *BACKENDS])
    def test_a_model_that_is_causal_on_eager_alone_has_to_be_loaded_with_it(self, backend):
        """PaliGemma asks for a causal mask, which is left out for sdpa; its layers tell sdpa that they are not causal."""
        model = self.paligemma("sdpa")
        changed = [*IDS[:-1], 77]
        plain = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in (IDS, changed)]
        assert off(plain[1][:-1], plain[0][:-1]) > 1e-2
        with pytest.raises(BackendError, match=r"but not on 'eager': .*; load it with attn_implementation='eager'"):
            leattn.forward(model, compile_prompt(ICLNode(IDS)), backend=backend)
        assert off(model(torch.tensor([IDS]), use_cache=False).logits[0], plain[0]) == 0
        model = self.paligemma("eager")
        expected = model(torch.tensor([IDS]), use_cache=False).logits
        prompt = compile_prompt(causal([IDS[:4], IDS[4:]]))
        assert off(leattn.forward(model, prompt, backend=backend, use_cache=False).logits, expected) < 1e-5

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_what_is_drawn_at_random_is_no_direction(self, backend):
        """As Reformer's hashes are."""
        model = make_model("llama")
        model.model.layers[0].register_forward_hook(lambda module, args, output: output + torch.rand_like(output))
        with pytest.raises(BackendError, match="the same text gives other logits each time, in evaluation mode too"):
            leattn.forward(model, compile_prompt(ICLNode(IDS)), backend=backend)


class TestRounding:
    def test_activations_that_are_quantised_are_not_called_a_dependence_on_the_index(self):
        """Each token by itself, as torchao does: no index matters, but the last digit decides about whole steps."""

        def quantised(module, args):
            scale = args[0].abs().amax(-1, keepdim=True) / 127
            return ((args[0] / scale).round() * scale,)

        model = make_model("llama")
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(quantised)
        plain = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in (IDS, [*IDS[:-1], 77])]
        assert off(plain[1][:-1], plain[0][:-1]) == 0
        report = leattn.check_model(model)
        reasons = [report[backend].reason for backend in BACKENDS if not report[backend].works]
        assert reasons
        for reason in reasons:
            assert "in their last digits change what it computes by" in reason


class TestAdvice:
    """What a refusal says to use has to be of use."""

    def test_no_other_backend_is_named_where_none_serves(self):
        config = tf.OpenAIGPTConfig(n_embd=48, n_layer=2, n_head=4, n_positions=64, vocab_size=100)
        report = leattn.check_model(tf.OpenAIGPTLMHeadModel(config).eval())
        for backend in BACKENDS:
            assert "ran without asking for an attention mask" in report[backend].reason
            assert "use backend=" not in report[backend].reason

    @pytest.mark.parametrize(
        ("family", "options", "refused"),
        [
            ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 4}, "flex"),  # transformers cannot
            ("doge", {"num_key_value_heads": 2, "keep_window_size": 16}, "sparse"),  # calculates with the mask
            ("doge", {"num_key_value_heads": 2, "keep_window_size": 16}, "flex"),  # drops the mask
            ("gptj", {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "sparse"),  # is fixed to eager
        ],
    )
    def test_the_backend_that_is_named_serves(self, family, options, refused):
        report = leattn.check_model(large(of(family, **options)))
        assert report[refused].reason.endswith("; use backend='eager'")
        assert report["eager"].works

    def test_the_implementation_that_is_named_serves(self):
        words = (
            "falcon fixes its attention implementation when it is loaded, here 'eager'; load it with attn_implementation='sdpa'"
        )
        assert leattn.check_model(make_model("falcon", alibi=False))["sdpa"].reason == words
        assert leattn.check_model(make_model("falcon", "sdpa", alibi=False))["sdpa"].works

    @pytest.mark.parametrize("options", [{}, {"kv_store": KVStore()}, {"use_cache": False}])
    def test_what_no_option_changes_goes_before_what_one_would(self, options):
        """MPT's own settings say use_cache=False, and the cache of a hybrid is of another kind."""
        root = ICLNode(IDS[:3])
        branches = leattn.ICLGraph(ICLNode(IDS[3:6], [root]), ICLNode(IDS[6:], [root]))
        for family, words in (("mpt", "takes no position_ids"), ("mamba", "a recurrent state")):
            with pytest.raises(BackendError, match=words):
                leattn.generate(make_model(family), branches, max_new_tokens=2, **options)

    def test_a_mask_that_is_more_than_causal_is_refused(self):
        """Gemma 3's tokens of a picture see each other: the graph's mask would stand in its place."""
        text = {**SMALL, "head_dim": 12, "num_key_value_heads": 2, "sliding_window": 4}
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {"image_size": 28, "patch_size": 14}
        options = {"text_config": text, "vision_config": {**vision, **sizes}}
        config = tf.Gemma3Config(**options, mm_tokens_per_image=4, image_token_index=99)
        model = tf.Gemma3ForConditionalGeneration(config).eval()
        prompt = compile_prompt(causal([IDS[:4], IDS[4:]]))
        expected = model(torch.tensor([IDS]), use_cache=False).logits
        assert off(leattn.forward(model, prompt, use_cache=False).logits, expected) < 1e-5
        root = ICLNode(IDS[:3])
        fan = compile_prompt(ICLNode(IDS[8:], [root, ICLNode(IDS[3:6], [root]), ICLNode(IDS[6:8], [root])]))
        written = [leattn.generate(model, fan, max_new_tokens=4, use_cache=use, eos_token_id=None) for use in (True, False)]
        assert written[0].token_ids.tolist() == written[1].token_ids.tolist()
        # What a processor gives for text alone; the windows of its sliding layers come in another form then.
        text = torch.zeros(1, len(IDS), dtype=torch.long)
        for backend in BACKENDS:
            found = leattn.forward(model, prompt, backend=backend, token_type_ids=text, use_cache=False).logits
            assert off(found, expected) < 1e-5
        kinds = torch.tensor([[0, 1, 1, *[0] * (len(IDS) - 3)]])
        with pytest.raises(BackendError, match="a mask that is more than causal attention and windows"):
            leattn.forward(model, prompt, token_type_ids=kinds, use_cache=False)
        assert off(model(torch.tensor([IDS]), use_cache=False).logits, expected) == 0


class TestDependenceOnTheIndex:
    def llama4(self, floor_scale):
        torch.manual_seed(0)
        config = tf.Llama4TextConfig(
            **SMALL,
            intermediate_size_mlp=64,
            num_key_value_heads=2,
            head_dim=12,
            num_local_experts=2,
            layer_types=["full_attention"] * 2,
            no_rope_layers=[1, 0],
            floor_scale=floor_scale,
            attn_scale=0.5,
        )
        return large(tf.Llama4ForCausalLM(config).eval())

    def test_exact_up_to_where_it_begins_and_refused_past_it(self):
        model = self.llama4(floor_scale=24)
        for length in (21, 23):
            ids = torch.randint(3, 99, (length,)).tolist()
            expected = model(torch.tensor([ids]), use_cache=False).logits
            found = leattn.forward(model, compile_prompt(causal([ids[:9], ids[9:]])), use_cache=False).logits
            assert off(found, expected) < 1e-5
        with pytest.raises(BackendError, match="24 tokens: in a sequence of more than 23, what llama4_text attends"):
            leattn.forward(model, compile_prompt(ICLNode(torch.randint(3, 99, (24,)).tolist())))

    def test_also_where_decoding_would_reach_it(self):
        model = self.llama4(floor_scale=24)
        prompt = compile_prompt(ICLNode(torch.randint(3, 99, (20,)).tolist()))
        leattn.generate(model, prompt, max_new_tokens=4, eos_token_id=None)  # the last one is not fed
        with pytest.raises(BackendError, match="24 tokens: in a sequence of more than 23"):
            leattn.generate(model, prompt, max_new_tokens=5, eos_token_id=None)
        with pytest.raises(BackendError, match="in a sequence of more than 23"), leattn.attend(model, prompt) as attention:
            model.generate(**attention.inputs, max_new_tokens=9, eos_token_id=None)

    def test_blocks_of_keys_chosen_by_index(self):
        pytest.importorskip("transformers.models.minimax_m3_vl", reason="a later transformers")
        from transformers.models.minimax_m3_vl import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

        sizes = {"dense_intermediate_size": 64, "shared_intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 12}
        index = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 16, "index_topk_blocks": 2}
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8, "mlp_layer_types": ["dense"] * 2}
        config = MiniMaxM3VLTextConfig(**SMALL, **sizes, **index, **experts, layer_types=["minimax_m3_sparse"] * 2)
        model = large(MiniMaxM3VLForCausalLM(config).eval())
        ids = torch.randint(3, 99, (40,)).tolist()
        expected = model(torch.tensor([ids[:32]]), use_cache=False).logits
        for backend in ("auto", *BACKENDS):
            if backend != "auto" and not leattn.check_model(model)[backend].works:
                continue
            prompt = compile_prompt(causal([ids[:20], ids[20:32]]))
            assert off(leattn.forward(model, prompt, backend=backend, use_cache=False).logits, expected) < 1e-5
            with pytest.raises(BackendError, match="40 tokens: in a sequence of more than 32"):
                leattn.forward(model, compile_prompt(ICLNode(ids)), backend=backend)

    def indexed(self):
        """One head of the indexer scores half of all tokens 0, and the index decides among equal scores."""
        sizes = {"moe_intermediate_size": 32, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
        index = {"index_topk": 24, "index_n_heads": 1, "index_head_dim": 16, "first_k_dense_replace": 1}
        return large(of("glm_moe_dsa", **sizes, **latent, **index, head_dim=8))

    def test_an_indexer_that_takes_all_that_a_token_sees_is_exact_in_a_longer_sequence(self):
        model = self.indexed()
        ids = torch.randint(3, 99, (49,)).tolist()
        root = ICLNode(ids[:4], id="root")
        documents = [ICLNode(ids[i : i + 9], [root], id=f"d{i}") for i in (4, 13, 22, 31)]
        question = ICLNode(ids[40:45], [root, documents[2]], id="question")
        whole = compile_prompt([*documents, question])
        assert len(whole) == 45
        for backend in ("eager", "sdpa"):
            logits = leattn.forward(model, whole, backend=backend, use_cache=False).logits[0]
            for document in documents:
                alone = model(torch.tensor([ids[:4] + list(document.content)]), use_cache=False).logits[0, 4:]
                assert off(logits[slice(*whole.spans[document])], alone) < 1e-5
            alone = model(torch.tensor([ids[:4] + ids[22:31] + ids[40:45]]), use_cache=False).logits[0, 13:]
            assert off(logits[slice(*whole.spans[question])], alone) < 1e-5
        assert leattn.check_model(model)["seen"].reason == "up to 24 tokens by each: past that it chooses among them"

    def test_an_indexer_that_would_have_to_choose_is_refused_also_where_decoding_would_reach_it(self):
        model = self.indexed()
        ids = torch.randint(3, 99, (49,)).tolist()
        root = ICLNode(ids[:4], id="root")
        documents = [ICLNode(ids[i : i + 9], [root], id=f"d{i}") for i in (4, 13, 22, 31)]
        both = compile_prompt(ICLNode(ids[40:45], [root, *documents[:2]]))
        with pytest.raises(BackendError, match="27 tokens: where one token sees more than 24, glm_moe_dsa attends to the 24"):
            leattn.forward(model, both)

        def nodes(written):
            """What the question sees are 19 of 21 tokens; the middle sees a note, which the question does not."""
            note = ICLNode(ids[13:15], [root])
            middle = ICLNode([9], [note])
            return [root, documents[2], note, middle, ICLNode(ids[40:45] + written, [root, documents[2], middle])]

        expected = []
        for _ in range(6):  # a full forward of the plain model for each, under a mask made by loops
            graph = nodes(expected)
            mask, at = dense(graph, relation(graph)), positions(graph, relation(graph))
            added = torch.zeros(len(mask), len(mask)).masked_fill(~torch.tensor(mask), torch.finfo(torch.float32).min)
            tokens = torch.tensor([[token for node in graph for token in node.content]])
            given = {"attention_mask": added[None, None], "position_ids": torch.tensor([at]), "use_cache": False}
            expected.append(int(model(tokens, **given).logits[0, -1].argmax()))
        question = compile_prompt(nodes([])[-1])
        written = leattn.generate(model, question, max_new_tokens=6, eos_token_id=None)
        assert written.token_ids.tolist() == expected  # the last would be the 25th that the question sees, but is not fed
        with pytest.raises(BackendError, match="25 tokens: where one token sees more than 24"):
            leattn.generate(model, question, max_new_tokens=7, eos_token_id=None)
        everything = torch.ones(1, 1, 45, 45, dtype=torch.bool).tril()
        apart = compile_prompt([*documents, ICLNode(ids[40:45], [root])])
        with pytest.raises(BackendError, match="45 tokens: where one token sees more than 24"):
            leattn.forward(model, apart, mask=everything, mask_mode="replace", use_cache=False)

    def test_the_probe_is_as_long_as_what_the_config_speaks_of(self):
        """A change that begins at token 30, which no setting of ours knows, but the config names."""
        model = make_model("llama")
        model.config.my_chunk_size = 30

        def leak(module, args, output):
            beyond = torch.arange(output.shape[1], device=output.device) >= 30
            return output + 0.3 * output.roll(1, 1) * beyond[:, None]

        model.model.layers[0].register_forward_hook(leak)
        with pytest.raises(BackendError, match="cannot follow a graph"):
            leattn.forward(model, compile_prompt(ICLNode([5, 6])))


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gpt2"])
    def test_what_is_exact_is_served(self, family, dtype):
        model = make_model(family).to(dtype)
        report = leattn.check_model(model)
        assert report["eager"].works, report["eager"].reason
        assert report["sparse"].works, report["sparse"].reason

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("share", [0.1, 0.3])
    def test_a_leak_of_a_few_percent_is_found_in_every_dtype(self, dtype, share):
        model = make_model("llama").to(dtype)
        model.model.layers[0].register_forward_hook(lambda module, args, output: output + share * output.roll(1, 1))
        with pytest.raises(BackendError, match="cannot follow a graph"):
            leattn.forward(model, compile_prompt(ICLNode([5, 6])))

    def test_a_verdict_is_made_anew_for_another_dtype(self):
        model = make_model("llama")
        assert leattn.check_model(model)["eager"].works
        hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output + 0.3 * output.roll(1, 1))
        assert not leattn.check_model(model.to(torch.bfloat16))["eager"].works
        hook.remove()


class TestKeywords:
    @pytest.mark.parametrize("backend", ["sdpa", "flex", "sparse"])
    @pytest.mark.parametrize("keyword", ["block_indices", "aux_scores", "s_new"])
    def test_what_a_layer_hands_over_and_nobody_knows_is_refused(self, backend, keyword):
        model = make_model("llama")
        prompt = compile_prompt(ICLNode([5, 6, 7]))
        leattn.forward(model, prompt, backend=backend)
        with pytest.raises(BackendError, match=f"its layers hand '{keyword}' to their attention, which .* would leave out"):
            leattn.forward(model, prompt, backend=backend, **{keyword: torch.ones(1)})

    def test_none_is_nothing(self):
        model = make_model("llama")
        leattn.forward(model, compile_prompt(ICLNode([5, 6, 7])), backend="sparse", s_aux=None)


class TestColumnsThatAreNotThePrompts:
    PROMPT = compile_prompt(ICLNode([42, 54, 13], [ICLNode([7, 23, 75], id="d")], id="q"))

    @pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
    @pytest.mark.parametrize("used_before", [False, True])
    def test_virtual_tokens_are_refused(self, kind, used_before):
        model = make_model("llama", "sdpa")
        if used_before:
            leattn.forward(model, self.PROMPT)
        common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
        tuning = {
            "prompt": peft.PromptTuningConfig(**common),
            "prefix": peft.PrefixTuningConfig(**common),
            "p-tuning": peft.PromptEncoderConfig(**common, encoder_hidden_size=16),
        }[kind]
        tuned = peft.get_peft_model(model, tuning).eval()
        for call in (
            lambda: leattn.forward(tuned, self.PROMPT),
            lambda: leattn.generate(tuned, self.PROMPT, max_new_tokens=2),
            lambda: leattn.generate(tuned, self.PROMPT, max_new_tokens=2, kv_store=KVStore()),
            lambda: leattn.check_model(tuned),
            lambda: leattn.model_inputs(tuned, self.PROMPT),
            lambda: leattn.warm(tuned, self.PROMPT, kv_store=KVStore()),
        ):
            with pytest.raises(BackendError, match="puts 4 virtual tokens in front of every input"):
                call()
        leattn.forward(tuned.get_base_model(), self.PROMPT)

    @pytest.mark.parametrize("length", [2, 5, 8, 20])
    def test_embeddings_of_another_number_are_refused(self, length):
        model = make_model("llama", "sdpa")
        vectors = torch.randn(1, length, 48)
        with leattn.attend(model, self.PROMPT) as attention:
            with pytest.raises(BackendError, match=f"inputs_embeds of {length} tokens .* the prompts have 6 columns"):
                model(inputs_embeds=vectors, use_cache=False)
            own = model.get_input_embeddings()(attention.inputs["input_ids"])
            expected = model(**attention.inputs, use_cache=False).logits
            assert torch.equal(model(inputs_embeds=own, use_cache=False).logits, expected)

    def test_positions_in_three_dimensions_are_refused_and_text_alone_is_right(self):
        rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
        text = {**SMALL, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": None}
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 48}
        patches = {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0]}
        tokens = {"image_token_id": 98, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
        torch.manual_seed(0)
        config = tf.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, **patches}, **tokens)
        model = tf.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
        expected = model(torch.tensor([IDS]), use_cache=False).logits
        written = model.generate(torch.tensor([IDS]), max_new_tokens=5, do_sample=False)[0, len(IDS) :].tolist()
        prompt = compile_prompt(causal([IDS[:4], IDS[4:]]))
        assert off(leattn.forward(model, prompt, use_cache=False).logits, expected) < 1e-5
        for options in ({}, {"use_cache": False}, {"kv_store": KVStore()}):
            assert leattn.generate(model, prompt, max_new_tokens=5, **options).token_ids.tolist() == written
        ids = [5, 6, 7, 96, 98, 98, 98, 98, 95, 11, 12]  # one picture of 2 x 2 tokens
        picture = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        picture["mm_token_type_ids"] = (torch.tensor([ids]) == 98).long()
        for call in (
            lambda: leattn.forward(model, compile_prompt(ICLNode(ids)), use_cache=False, **picture),
            lambda: leattn.generate(model, compile_prompt(ICLNode(ids)), max_new_tokens=2, **picture),
        ):
            with pytest.raises(BackendError, match="positions in three dimensions"):
                call()
        with leattn.attend(model, compile_prompt(ICLNode(ids))), pytest.raises(BackendError, match="three dimensions"):
            model(input_ids=torch.tensor([ids]), use_cache=False, **picture)


class TestReasons:
    @pytest.mark.parametrize("error", [AssertionError, KeyError, ZeroDivisionError, OSError, RecursionError, RuntimeError])
    def test_whatever_a_probe_raises_is_a_reason(self, error):
        model = make_model("llama")
        calls = []

        def fails(module, args, kwargs):
            calls.append(module)
            if len(calls) > 2:  # plain text works
                raise error("from inside")

        model.model.layers[1].register_forward_pre_hook(fails, with_kwargs=True)
        report = leattn.check_model(model)
        assert not report.ok
        assert f"{error.__name__}: " in report["eager"].reason
        assert "from inside" in report["eager"].reason

    def test_weights_that_are_not_there(self):
        model = copy.deepcopy(shared_model("llama")).to("meta")
        assert "has no values for" in leattn.check_model(model)["eager"].reason
        with pytest.raises(BackendError, match=r"has no values for .* \(meta device\)"):
            leattn.forward(model, compile_prompt(ICLNode([5, 6])))

    def test_a_classifier_gives_no_logits_per_token(self):
        model = AutoModelForSequenceClassification.from_config(shared_model("llama").config).eval()
        with pytest.raises(BackendError, match=r"reads a row of logits per token"):
            leattn.forward(model, compile_prompt(ICLNode([5, 6])))
        assert not leattn.check_model(model).ok

    @pytest.mark.parametrize("head", ["none", "classifier"])
    @pytest.mark.parametrize("store", [False, True])
    def test_what_has_no_generate_says_so(self, head, store):
        model = make_model("llama").model
        if head == "classifier":
            model = AutoModelForSequenceClassification.from_config(model.config).eval()
        for nodes in (ICLNode([5, 6]), [ICLNode([5, 6]), ICLNode([7, 8])], leattn.GenNode([5, 6], max_new_tokens=2)):
            with pytest.raises(BackendError, match=rf"{type(model).__name__} has no generate; load it"):
                leattn.generate(model, nodes, kv_store=KVStore() if store else None)

    def test_a_path_is_no_model(self):
        with pytest.raises(BackendError, match=r"'/some/model' is no model; load it first"):
            leattn.generate("/some/model", compile_prompt(ICLNode([5, 6])))

    def test_layers_that_borrow_keys_are_no_state(self):
        """Gemma 3n and 4 share keys between layers; a hybrid's config may consist of attention alone."""
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 4}
        types = ["sliding_attention", "full_attention"] * 2
        per_layer = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2}
        base = {**SMALL, **heads, "layer_types": types, **per_layer, "sliding_window": 6}
        torch.manual_seed(0)
        models = [
            tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**base)),
            tf.Gemma3nForCausalLM(
                tf.Gemma3nTextConfig(**{**base, "intermediate_size": [64] * 4}, activation_sparsity_pattern=[0.0] * 4)
            ),
            tf.GraniteMoeHybridForCausalLM(
                tf.GraniteMoeHybridConfig(
                    **{**SMALL, "num_key_value_heads": 2},
                    layer_types=["full_attention"] * 2,
                    position_embedding_type="rope",
                    num_local_experts=0,
                    shared_intermediate_size=64,
                    mamba_n_heads=8,
                    mamba_d_head=12,
                )
            ),
        ]
        for model in models:
            model.eval()
            expected = model(torch.tensor([IDS[:6]]), use_cache=False).logits
            report = leattn.check_model(model)
            assert report["eager"].works, report["eager"].reason
            for backend in (one for one in BACKENDS if report[one].works):
                prompt = compile_prompt(causal([IDS[:4], IDS[4:6]]))
                assert off(leattn.forward(model, prompt, backend=backend, use_cache=False).logits, expected) < 1e-5
