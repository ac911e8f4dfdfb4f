"""What is claimed, and what shows it. README.md has the six claims that matter most, with their figures.

| claim | test | tolerance | measured |
|---|---|---|---|
| every scan is the float64 loop, in values and gradients | `test_every_scan_is_the_float64_loop_in_values_and_all_gradients` | 3e-5 of the largest value | 9e-7, `python scan.py` |
| so are the Triton kernels, interpreted | `test_values_and_gradients_are_the_float64_loops` | fp32 1e-5, bf16 8e-3, fp16 1e-3 | 4e-7, 6e-3, 5e-4 |
| and compiled for sm_90 and run on a CPU, by Triton 3.7.1 and 3.9 | `test_compiled_for_an_h100_and_run_on_a_cpu_the_results_are_the_float64_loops` | the same | the same |
| at the 7B's sizes they spill no registers on an H100, A100 or MI300 | `test_nothing_spills` | 0 bytes | 0 bytes |
| cutting a sequence anywhere changes nothing | `test_splitting_the_sequence_changes_nothing`, `test_reading_in_pieces_is_reading_at_once` | 1e-5, 1e-4 | 2e-7, 3e-7 |
| the future cannot change the past | `test_the_future_cannot_change_the_past` | the same bits | the same bits |
| the logits are transformers' | `test_transformers_loads_what_we_save_and_agrees`, `test_logits_are_those_that_the_reference_gave_once` | 1e-4; without a norm they are off by 2 | 3e-7, 2e-6 |
| so are the gradients | `test_gradients_agree_with_the_reference` | 1e-3 | 1e-6 |
| packed documents and padding do not leak | `test_packed_documents_do_not_leak`, `test_unequal_prompts_in_a_batch_equal_each_alone` | the same bits, 1e-4 | the same bits, 2e-7 |
| the tokenizer is Falcon's | `test_the_tokenizer_agrees_with_the_published_vectors` | equal | 47 of 47 texts |
| the schedule is the paper's | `test_the_7b_recipe_has_the_published_values` | equal | |
| two processes, or four passes a step, draw the curve of one | `test_two_processes_draw_the_curve_of_one`, `test_four_passes_a_step_draw_the_curve_of_one` | 2e-5 | 2e-7, 4e-7 |
| a killed run goes on as if it had not been | `test_signals_save_and_leave_with_0_and_resuming_gives_the_same_bits`, `python tests/kill_loop.py 200` | the same bits | 200 kills in 41 runs |
| bad input ends in one sentence | `tests/test_bad_checkpoint.py`, `tests/test_bad_sample.py`, `tests/test_bad_train.py`, `tests/test_fuzz.py` | no traceback, no hang, no read outside the folder | 990 fuzz cases |
| every command in README.md runs, at a small size | `tests/test_readme.py` | | |

This is a package so that no installed one of its name takes its place: train.py and scan_triton.py import from it.
"""
