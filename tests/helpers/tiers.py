"""Two tiers of tests: `make check` before each commit, `make test` everything.

What `make check` leaves out is marked `thorough` (pytest -m "not thorough"), by the table below: a
room, a file or a test, and why it takes long.  ATTN_EXT_TIER=check also runs what is left on less:
the CUDA kernels in the emulator's mode "plain", two instruction sets, five examples of hypothesis.
"""

import os

CHECK = os.environ.get("ATTN_EXT_TIER", "everything") == "check"

THOROUGH = {
    "api/test_additive.py::test_memory": "long sequences",
    "api/test_additive.py::test_opcheck": "traces the operators many times",
    "api/test_cache.py::test_compile": "torch.compile",
    "api/test_far_lse.py::test_rows_of_a_far_bias": "rows of several blocks of keys, many features",
    "api/test_inspect.py::test_memory": "long sequences",
    "api/test_nn_multihead.py::test_compile": "torch.compile",
    "api/test_numbers.py::test_symbolic_floats": "torch.compile",
    "api/test_numbers.py::test_symbolic_ints": "torch.compile",
    "api/test_second_order.py::test_every_combination_of_features": "256 calls",
    "api/test_second_order.py::test_memory": "long sequences",
    "api/test_strangers_calls.py::test_command_line_on_a_terminal_of_little_help": "processes",
    "cpu/test_cpu_amx.py": "each AMX instruction is a signal",
    "cpu/test_decode_group_mutations.py": "a compilation each",
    "cpu/test_far_row_mutations.py": "a compilation each",
    "cpu/test_few_queries_mutations.py": "a compilation each",
    "cpu/test_fork.py": "a process for each order of calls",
    "cpu/test_kernels.py::test_many_heads": "the largest blocks of keys",
    "cpu/test_masked_tiles.py::test_structures": "long sequences; those with bands remain",
    "cpu/test_inspect_kernel_mutations.py::test_planted_bug_is_caught": "a compilation each",
    "cpu/test_second_kernel_mutations.py::test_planted_bug_is_caught": "a compilation each",
    "cpu/test_second_kernels.py::test_every_combination_of_features": "256 calls",
    "cpu/test_threads_and_fork.py": "processes that could hang",
    "cuda/test_cuda_far_mutations.py": "a compilation each",
    "cuda/test_cuda_frame_mutations.py": "a compilation each",
    "cuda/test_features.py::test_parts_as_they_are_compiled": "compiles kernels",
    "cuda/test_frames.py::test_frames_of_whole_calls": "each feature at each place",
    "cuda/test_cuda_kernels.py::test_backward_in_one_kernel": "long sequences",
    "cuda/test_cuda_kernels.py::test_backward_in_two_kernels": "long sequences",
    "cuda/test_cuda_sm90.py::test_bad_keys_of_the_other_warpgroup": "the same",
    "cuda/test_cuda_sm90.py::test_bad_output_gradients_reach_exactly_who_is_seen": "the same",
    "cuda/test_cuda_sm90.py::test_bad_values_reach_exactly_who_sees_them": "two results each",
    "cuda/test_cuda_sm90.py::test_infinities_in_visible_rows": "each result is computed twice",
    "cuda/test_cuda_sm90.py::test_runs_are_bitwise_equal": "each result is computed twice",
    "cuda/test_cuda_sm90_feature_mutations.py": "a compilation each",
    "cuda/test_cuda_sm90_values_mutations.py": "a compilation each",
    "cuda/test_cuda_sm90_varlen.py::test_neighbours_do_not_count": "each result is computed twice",
    "cuda/test_driver.py::test_forward_and_backward": "compiles kernels",
    "cuda/test_driver.py::test_the_way_that_ships": "compiles kernels",
    "cuda/test_driver.py::test_threads_devices_and_streams": "compiles kernels",
    "cuda/test_emulator.py::test_portable_fibers": "compiles the emulator",
    "cuda/test_emulator_mutations.py::test_kernels_as_they_are_pass_every_mode": "the same",
    "cuda/test_emulator_mutations.py::test_kernels_stay_within_their_tensors": "the same",
    "cuda/test_emulator_mutations.py::test_planted_bug_is_caught": "a compilation each",
    "cuda/test_emulator_mutations.py::test_sanitizer_sees_a_copy_past_the_last_key": "the same",
    "cuda/test_emulator_sm90.py::test_program_agrees_with_the_module": "compiles the emulator",
    "cuda/test_emulator_sm90.py::test_program_compiles_with_nvcc": "nvcc",
    "cuda/test_golden_bits.py": "compiles the emulator",
    "cuda/test_machine_code.py::test_hopper_kernels_compute_while_the_tensor_cores_do": "NVRTC",
    "cuda/test_machine_code.py::test_hopper_kernels_use_hoppers_instructions": "NVRTC",
    "cuda/test_machine_code.py::test_hot_loops_have_no_more_instructions_than_the_table_says": "NVRTC",  # noqa: E501
    "cuda/test_machine_code.py::test_kernels_take_no_more_than_the_table_says": "NVRTC",
    "cuda/test_ptx.py::test_kernels": "compiles kernels",
    "cuda/test_ptx.py::test_races_in_compiled_code_name_lines_of_ptx": "compiles kernels",
    "cuda/test_ptx.py::test_several_makers_of_one_library": "compiles",
    "cuda/test_ptx.py::test_wrappers_of_hopper": "compiles kernels",
    "cuda/test_ptx_golden.py": "compiles",
    "cuda/test_ptx_mutations.py": "compiles kernels",
    "distributed/test_context.py": "processes",
    "distributed/test_context_examples.py": "processes",
    "distributed/test_newcomers.py": "processes",
    "distributed/test_training.py": "processes",
    "integrations/test_flash_attn_helpers.py::test_diffusers_imports_the_stand_in": "a process",
    "integrations/test_models_cache.py": "libraries of models",
    "integrations/test_models_checkpoint.py": "libraries of models",
    "integrations/test_models_diffusers.py": "libraries of models",
    "integrations/test_models_encoders.py": "libraries of models",
    "integrations/test_models_function.py": "libraries of models",
    "integrations/test_models_llama.py": "libraries of models",
    "integrations/test_models_timm.py": "libraries of models",
    "integrations/test_xformers_compat.py::test_compiled": "torch.compile",
    "package/test_install.py": "builds an archive; processes that import torch",
    "package/test_pictures.py::test_pictures_are_drawn_by_their_scripts": "draws all of them",
    "package/test_pictures.py::test_the_picture_of_look_can_be_drawn": "a process",
    "package/test_ptx_runs.py": "processes of pytest",
    "tools/test_cli.py::test_bench": "measures",
    "tools/test_cli.py::test_interrupted_bench_leaves_finished_rows": "measures",
    "tools/test_cli.py::test_the_installed_script_runs_without_a_traceback": "processes",
    "tools/test_cli.py::test_verify_names_the_case_that_a_wrong_backend_fails": "the whole matrix",
    "tools/test_cli.py::test_verify_sees_every_kind_of_wrong_result": "the same",
    "tools/test_examples.py": "trains models",
    "tools/test_family_examples.py": "trains models",
    "tools/test_gpu_bench.py": "benchmarks, in processes of their own",
    "tools/test_look.py::test_every_map_of_the_picture": "draws each map",
    "tools/test_look.py::test_size_of_a_page": "a page of 4,096 tokens",
    "tools/test_look.py::test_look_command": "a process and a picture",
    "tools/test_look.py::test_tokens": "a page for each kind of tokens",
    "tools/test_look_page.py::test_a_long_text": "a browser; two other tests in it remain",
    "tools/test_look_page.py::test_in_a_notebook_and_without_network": "the same",
    "tools/test_look_page.py::test_pointer_maps_and_colours": "the same",
    "tools/test_look_page.py::test_queries_that_are_another_text": "the same",
    "tools/test_profile.py::test_a_script_that_fails_keeps_its_traceback": "the same",
    "tools/test_profile.py::test_options_after_the_script_are_the_scripts": "the same",
    "tools/test_profile.py::test_options_of_the_command": "processes",
    "tools/test_profiling.py::test_bench_cpu_runs_a_row": "measures",
    "tools/test_profiling.py::test_figures_are_not_blank": "draws",
    "torch/test_allocations.py::test_defaults_change_no_result": "processes",
    "torch/test_compile.py": "torch.compile",
    "torch/test_compile_transforms.py": "torch.compile",
    "torch/test_dtensor.py": "two processes",
    "torch/test_fast.py::test_import_leaves_the_flop_counter_alone": "a process",
    "torch/test_replace_sdpa.py::test_a_compiled_module_on_jagged_tensors": "torch.compile",
    "torch/test_replace_sdpa.py::test_the_first_compilation_of_a_process_under_the_switch": "same",
    "torch/test_sdpa_compile_scope.py": "torch.compile",
    "torch/test_sdpa_semantics.py::test_import_leaves_the_compiler_alone": "a process",
    "torch/test_second_transforms.py::test_compiled": "torch.compile",
    "torch/test_torch_integration.py::test_gradcheck": "finite differences",
    "torch/test_torch_integration.py::test_opcheck": "traces the operators many times",
    "triton/interpreter": "Triton's interpreter",
    "triton/test_triton_backend.py::test_importing_attn_ext_does_not_import_the_kernels": "process",
    "triton/test_triton_backend.py::test_the_kernels_are_never_a_top_level_module": "a process",
    "triton/test_triton_backend.py::test_without_triton_all_else_works": "a process",
    "triton/test_triton_code.py": "compiles Triton kernels",
    "triton/test_triton_compile.py::test_kernels_compile_and_take_what_the_table_says": "compiles",
    "triton/test_triton_family_compile.py": "compiles Triton kernels",
    "triton/test_triton_ptx.py::test_kernels": "compiles kernels",
    "triton/test_triton_ptx_mutations.py": "compiles kernels",
    "triton/test_triton_replay.py": "compiles Triton kernels",
    "triton/test_triton_second_compile.py": "compiles Triton kernels",
}


# Begun before all others, since some of each takes ten seconds and more
FIRST = (
    "tests/tools/test_gpu_bench.py", "tests/tools/test_family_examples.py",
    "tests/tools/test_examples.py", "tests/triton/test_triton_", "tests/cuda/test_machine_code.py",
    "tests/torch/test_compile.py", "tests/torch/test_allocations.py", "tests/torch/test_dtensor.py",
    "tests/api/test_backends_hypothesis.py",
)  # fmt: skip


def place_in_line(nodeid: str) -> int:
    """By which a run orders its tests; equal ones stay as they were collected."""
    return next((i for i, place in enumerate(FIRST) if nodeid.startswith(place)), len(FIRST))


def reason(nodeid: str) -> str:
    """Why a test (tests/room/file.py::name[case]) or a file is thorough; "" if it is not."""
    place, _, name = nodeid.removeprefix("tests/").partition("::")
    places = [place, *(f"{place}::{name.split('[')[0]}" for _ in [0] if name)]
    while "/" in place:
        place = place.rpartition("/")[0]
        places.append(place)
    return next((THOROUGH[each] for each in places if each in THOROUGH), "")


def isas(supported: list[str], default: str) -> list[str]:
    """The instruction sets that tests run on: the plainest and the default one to check."""
    return [i for i in supported if i in (supported[0], default)] if CHECK else list(supported)
