"""What went wrong in systems like this one, and the tests that keep it from going wrong here.

`LESSONS` has one entry for each published vulnerability (C), public fix or report (F), and weak
place that we read in the original code (O). `tests` names what covers it, as FILE::TEST below
`tests/`. What nothing here can go wrong with yet is in `LATER`, with a word why.
"""

_LATTICE = "any_bytes/test_lattice.py::test_altered_requests_get_an_answer_in_every_state"
_DEEP = "any_bytes/test_lattice.py::test_altered_requests_get_an_answer_when_all_is_authorized"
_SEQUENCES = "any_bytes/test_random_commands.py::test_any_sequence_gets_answers"
_VTPM_IMAGE = "daemons/vtpm/test_image.py::test_"
_VAULT = "daemons/manager/test_vault.py::test_"
_FORMAT = "daemons/manager/test_vault_format.py::test_"
_CHIP_MEMORY = "daemons/test_chip_memory.py::test_"
_RING = "daemons/test_ring.py::test_"
_TPM0 = "daemons/guest/test_tpm0.py::test_"
_REQUESTS = "daemons/manager/test_requests.py::test_"
_MANAGER_CHIP = "daemons/manager/test_chip.py::test_"
_LISTENERS = "daemons/test_listeners.py::test_"
_LOST_POWER = "daemons/manager/test_vault_power_loss.py::test_"
_OURS = "any_bytes/test_lessons.py::test_"

LESSONS = {
    "C1": (
        "CVE-2022-23645: swtpm believed the size in a blob's header",
        _VTPM_IMAGE + "every_flipped_byte_of_the_committed_slot_is_refused",
        _FORMAT + "root_with_a_flipped_byte_is_torn",
        _CHIP_MEMORY + "what_is_no_memory_is_refused_with_the_reason",
        _OURS + "stored_record_of_another_length_is_refused",
    ),
    "C2": (
        "CVE-2026-75900: a blob shorter than its header passed for one",
        "tpm12/test_state_codec.py::test_every_prefix_is_refused_or_loses_whole_records_only",
        _VAULT + "truncated_image_is_refused",
        "protocol/test_manager_messages.py::test_every_truncation_is_refused",
        "daemons/manager/test_sealing.py::test_truncated_seal_is_refused",
    ),
    "C3": (
        "swtpm#1170: offset and length together passed 2^32",
        _VAULT + "root_that_contradicts_the_image_is_refused",
        _VAULT + "node_that_is_two_nodes_is_refused",
        _OURS + "nv_access_past_32_bits_is_refused",
        _VAULT + "random_operations_match_a_dictionary",
    ),
    "C4": (
        "CVE-2020-28407: swtpm opened its files through planted links",
        "daemons/test_disk.py::test_symbolic_link_is_not_followed",
        "daemons/test_disk.py::test_fifo_does_not_hang_and_is_refused",
        "daemons/launcher/test_fork_server.py::test_log_that_is_a_symlink_is_refused",
        "daemons/test_registry.py::test_put_does_not_write_through_a_planted_symlink",
        _CHIP_MEMORY + "open_does_not_follow_a_link",
        _LISTENERS + "lock_on_a_hard_link_is_refused",
        "daemons/manager/test_handle_journal.py::test_symbolic_link_is_not_followed",
        ("daemons/launcher/test_take_over.py"
         "::test_launcher_that_cannot_take_over_says_why_and_disturbs_nobody"),
        "system/test_damage_matrix.py::test_damage_is_refused_or_does_not_matter",
    ),
    "C5": (
        "CVE-2020-24330 to -24332: tcsd's files and rights were its user's to change",
        "daemons/test_policy.py::test_load_file_that_others_may_write_to_is_refused",
        "daemons/test_disk.py::test_image_that_others_may_write_is_refused",
        "daemons/test_places.py::test_prepare_directory_of_somebody_else_is_refused",
    ),
    "C6": (
        "CVE-2012-0698: tcsd used an offset inside a packet unseen",
        "protocol/test_tpmif.py::test_any_messages_to_a_backend_give_events_or_one_named_error",
        "protocol/test_manager_messages.py::test_any_bytes_decode_or_raise_the_one_error",
        "daemons/launcher/test_control.py::test_wrong_request_is_answered_and_the_next_one_served",
        "protocol/test_tis_messages.py::test_malformed_request_is_a_decode_error",
    ),
    "C7": (
        "CVE-2023-1017 and -1018: a size was used before the bytes were known to be there",
        _LATTICE,
        _DEEP,
        "protocol/test_wire.py::test_every_cut_is_too_short",
        "protocol/test_wire.py::test_a_huge_length_allocates_nothing",
    ),
    "C8": (
        "CVE-2021-3746: commands led to a state that could not be saved",
        _SEQUENCES,
        _OURS + "most_state_that_fits_is_saved",
    ),
    "C9": (
        "CVE-2021-3623: resuming believed sizes inside saved state",
        _OURS + "altered_state_is_refused_or_read",
        "fuzz/test_targets.py::test_target_takes_its_seeds",
    ),
    "C10": (
        "libtpms#614: skipping what a later version wrote had no end",
        "tpm12/test_state_codec.py::test_what_is_not_understood_is_refused_with_the_reason",
        _VAULT + "other_version_is_named",
    ),
    "C11": (
        "CVE-2021-3569: decryption wrote past what its caller had room for",
        _OURS + "plaintext_of_any_length_is_unbound",
        _OURS + "plaintext_of_any_length_is_unsealed_or_refused",
        "tpm12/commands/test_storage.py::test_un_bind_with_bad_pkcs1_padding_is_no_oracle",
    ),
    "C12": (
        "CVE-2021-3505: made keys were weaker than their size",
        _OURS + "generated_keys_are_as_strong_as_their_size",
        "tpm12/test_primes.py::test_rsa_primes_have_the_form_that_is_asked",
        "tpm12/test_primes.py::test_rsa_primes_share_no_factors",
    ),
    "C13": (
        "CVE-2026-21444: an initial vector was used twice",
        _OURS + "same_plaintext_is_never_sealed_the_same_way",
        _VAULT + "same_record_is_never_encrypted_the_same_way",
        _VTPM_IMAGE + "every_save_has_a_fresh_key_and_nothing_readable",
        "tpm12/commands/test_auth_sessions.py::test_session_goes_on_with_a_new_nonce_each_time",
    ),
    "C14": (
        "CVE-2025-49133: a scheme that does not go with its key ended the process",
        _OURS + "every_key_with_every_use_gives_an_answer",
        "tpm12/test_crypto.py::test_any_two_numbers_are_refused_or_computed_with",
    ),
    "C15": (
        "CVE-2026-6727: the time of a decryption told of its data",
        "tpm12/test_crypto.py::test_oaep_failures_all_look_the_same",
        "tpm12/test_crypto.py::test_is_same",
    ),
    "C16": (
        "CVE-2018-6622: resuming without saved state gave fresh PCRs",
        ("tpm12/commands/test_startup.py"
         "::test_startup_state_without_saved_state_is_failure_mode_until_power_goes"),
        _OURS + "saved_state_does_not_survive_an_extend",
    ),
    "C17": (
        "CVE-2017-16837: what decided after the launch had not been measured",
        "daemons/launcher/test_measuring.py::test_program_any_changed_byte_changes_the_digest",
        "daemons/launcher/test_platform_firmware.py::test_changed_policy_changes_pcr_5_and_17",
        "daemons/launcher/test_firmware.py::test_power_on_changed_part_changes_just_its_pcrs",
    ),
    "C22": (
        "GHSA-pg75-v6fp-8q59: one idle connection stopped a server",
        _RING + "two_hundred_half_open_connections_cost_nobody_anything",
        _TPM0 + "client_that_stalls_inside_a_command_is_let_go",
        "daemons/test_service.py::test_excess_connections_are_closed_and_cost_the_others_nothing",
        "daemons/test_tis_server.py::test_peer_that_reads_no_answers_ends_alone",
        ("daemons/launcher/test_control.py"
         "::test_connections_on_which_nobody_asks_anything_keep_nobody_out"),
        "system/test_hostile_peers.py::test_attacks_at_every_door_at_once_cost_nobody_anything",
    ),
    "C23": (
        "GHSA-6xx7-m45w-76m2: what came in had no limit",
        "protocol/test_manager_messages.py::test_huge_counts_are_refused_without_allocating",
        _TPM0 + "largest_command_passes_and_larger_is_refused",
        ("daemons/launcher/test_control.py"
         "::test_line_that_is_too_long_ends_the_connection_with_a_reason"),
        "daemons/guest/test_boot_image.py::test_image_file_over_the_limit_is_not_read",
    ),
    "C24": (
        "CVE-2022-23949: names went into logs as they came",
        ("daemons/test_logs.py"
         "::test_text_from_outside_can_neither_forge_a_line_nor_drive_a_terminal"),
        "daemons/test_logs.py::test_long_text_is_cut",
        "daemons/test_places.py::test_domain_name_unsafe_one_is_refused_and_shown_escaped",
    ),
    "C25": (
        "CVE-2022-23950: a socket stood where anyone could put one",
        _LISTENERS + "directory_open_to_others_is_refused",
        _LISTENERS + "socket_file_has_mode_0600_whatever_the_umask",
        _LISTENERS + "peer_is_who_the_kernel_says",
        "system/test_main_job.py::test_everything_below_the_root_is_private",
    ),
    "C27": (
        "CVE-2026-1709: administrative calls were open to strangers",
        _REQUESTS + "management_is_for_administrators",
        _REQUESTS + "first_vtpm_does_not_become_administrator",
        "daemons/manager/test_admission.py::test_stranger_is_refused",
        "daemons/launcher/test_control.py::test_only_the_same_user_and_root_are_heard",
    ),
    "C28": (
        "ms-tpm-20-ref#100, #91: a size from a socket passed what a counter holds",
        _TPM0 + "impossible_size_gets_an_error_and_a_closed_connection",
        "protocol/test_framing.py::test_impossible_size_ends_the_stream_with_an_error_response",
        "any_bytes/test_sockets.py::test_simulator_stays_flat_over_garbage_clients",
    ),
    "F1": (
        "Xen 5974702bdd: the manager unpacked what was too short",
        _REQUESTS + "less_than_a_header",
        _REQUESTS + "wrong_tags_and_lengths",
        "protocol/test_manager_messages.py::test_every_truncation_is_refused",
    ),
    "F2": (
        "Xen 746d20b112, ec9596dc53, 1b4bfa0b8f: keys and sessions stayed in the chip",
        _MANAGER_CHIP + "start_leaves_sessions_and_keys_at_their_baseline",
        _MANAGER_CHIP + "sessions_of_a_killed_manager_are_flushed_and_no_others",
    ),
    "F3": (
        "Xen c8d8a1e2e6: options were read by nobody",
        "daemons/xl/test_domain_arguments.py::test_manager_every_option_has_an_effect",
        ("daemons/xl/test_domain_arguments.py"
         "::test_manager_unknown_or_malformed_option_is_refused"),
    ),
    "F4": (
        "Xen 64d00dd126, 7f4276fad8: sizes of 16 and 32 bits were mixed",
        _REQUESTS + "any_number_of_random_bytes_is_the_chips_to_judge",
        _REQUESTS + "random_of_another_length_is_refused",
    ),
    "F6": (
        "xen-devel 2009-08: a state that had shrunk kept its old tail",
        _OURS + "state_that_shrinks_leaves_no_tail",
    ),
    "F7": (
        "tpm-emulator 910c432: a digest was compared with an address",
        "tpm12/commands/test_auth_change.py::test_asym_finish_gives_a_key_with_the_new_secret",
        ("tpm12/commands/test_auth_change.py"
         "::test_asym_finish_with_the_srks_own_secret_is_authfail"),
        ("tpm12/commands/test_auth_sessions.py"
         "::test_any_flipped_byte_of_the_auth_block_is_refused"),
    ),
    "F8": (
        "tpm-emulator ef559ea: descriptors were lost with their peers",
        "any_bytes/test_sockets.py::test_simulator_stays_flat_over_garbage_clients",
        _RING + "descriptors_and_threads_stay_flat_over_many_connections",
        "daemons/test_service.py::test_descriptors_stay_flat_over_many_connections",
        "system/test_hostile_peers.py::test_thousands_of_connects_leave_nothing",
    ),
    "F9": (
        "tpm-emulator: Quote2, MakeIdentity, NV and CMK commands were wrong for years",
        "differential/test_differential.py::test_swtpm_answers_the_same_but_for_named_deviations",
        "tpm12/commands/test_integrity.py::test_quote2_signs_composite_locality_and_version",
        "tpm12/commands/test_identity.py::test_make_identity_wraps_what_the_specification_says",
        ("tpm12/commands/test_migration_cmk.py"
         "::test_cmk_create_blob_to_an_authority_is_what_the_specification_says"),
    ),
    "F10": (
        "libtpms#615, #616, #619: enumerations and inner sizes were used unseen",
        _DEEP,
        "tpm12/test_crypto.py::test_sign_der_of_a_size_that_cannot_be",
    ),
    "F11": (
        "libtpms#609: a record was half written when its parsing failed",
        "tpm12/commands/test_failed_commands.py::test_failed_command_changes_nothing",
        _REQUESTS + "blob_of_another_length_is_refused_and_nothing_is_taken",
        _SEQUENCES,
    ),
    "F12": (
        "libtpms 0.10: a mended comparison closed old sealed blobs",
        "tpm12/commands/test_storage.py::test_unseal_of_a_blob_made_with_the_formulas",
    ),
    "F13": (
        "tpm2-tss#1164: a client fell to a hostile TPM",
        "hwtpm/test_tis_driver.py::test_any_register_values_end_in_a_response_or_a_named_error",
        "daemons/vtpm/test_manager_link.py::test_nonsense_is_a_failure_and_never_a_new_vtpm",
        _RING + "backend_that_sends_garbage_is_left_with_a_reason",
        _TPM0 + "client_names_an_answer_that_is_none",
        _MANAGER_CHIP + "garbage_from_the_chip_is_one_failure",
        _OURS + "client_gets_one_named_error_from_any_response",
    ),
    "F14": (
        "swtpm: ready too early, secrets left where they could be read",
        _OURS + "secrets_are_in_no_repr",
        _VAULT + "secrets_are_not_in_reprs",
        _MANAGER_CHIP + "secrets_are_not_shown",
        "daemons/test_service.py::test_service_manager_hears_ready_and_stopping",
    ),
    "F15": (
        "swtpm#655: starts at the same time disturbed each other",
        _LISTENERS + "concurrent_starts_give_exactly_one_listener",
        _LISTENERS + "instances_that_come_and_go_never_hold_the_lock_together",
        ("daemons/launcher/test_domains.py"
         "::test_second_launcher_of_a_root_is_refused_and_the_first_goes_on"),
    ),
    "F17": (
        "go-tpm#91: the two ends disagreed on when a connection ends",
        _TPM0 + "commands_in_one_write_are_answered_one_by_one",
        _TPM0 + "client_silent_between_commands_stays",
        ("daemons/launcher/test_control.py"
         "::test_client_that_only_closed_its_sending_side_still_gets_its_answer"),
    ),
    "F18": (
        "swtpm#203: a second controller took the first one's channel",
        "daemons/launcher/test_control.py::test_slow_method_holds_up_nobody",
        "daemons/test_disk.py::test_second_user_is_told_who_holds_the_image",
    ),
    "O1": (
        "vtpmblk.c: the slot was flipped before it was written",
        _VTPM_IMAGE + "a_refused_commit_fails_the_save_and_keeps_the_committed_slot",
        _VTPM_IMAGE + "power_loss_in_a_save_leaves_the_committed_state",
    ),
    "O2": (
        "vtpmblk.c: a manager that was busy made a fresh vTPM",
        ("daemons/vtpm/test_manager_link.py"
         "::test_unknown_is_the_one_answer_that_permits_a_new_vtpm"),
        "daemons/vtpm/test_manager_link.py::test_every_other_refusal_is_a_failure",
        _VTPM_IMAGE + "a_blank_image_of_a_known_uuid_is_refused",
    ),
    "O4": (
        "SaveHashKey: a stranger's first call made it an administrator",
        _REQUESTS + "first_vtpm_does_not_become_administrator",
        _REQUESTS + "uuid_that_is_not_known_yet_has_one_holder_too",
        "daemons/manager/test_admission.py::test_vtpm_is_admitted_with_what_the_registry_says",
    ),
    "O5": (
        "label hashing: labels were cut, and a star stood for more than the user",
        "daemons/test_labels.py::test_parse_longest_label_is_taken_whole",
        "daemons/manager/test_admission.py::test_star_stands_for_the_user_and_nothing_else",
    ),
    "O6": (
        "vtpm.c: a label that no pattern knew was searched past its end",
        "daemons/test_labels.py::test_matches_pattern_exact_or_by_suffix",
        "daemons/vtpm/test_backend.py::test_a_label_that_no_rule_names_may_claim_nothing",
    ),
    "O7": (
        "tpmback.c: offset and length wrapped; shared fields were read twice",
        "protocol/test_tpmif.py::test_length_that_is_not_the_packets_is_refused",
        "protocol/test_tpmif.py::test_extra_pages_and_used_padding_are_refused",
        _RING + "frontend_that_breaks_the_protocol_costs_itself_alone",
    ),
    "O8": (
        "vtpmblk.c: the length of a plaintext was believed",
        _VTPM_IMAGE + "every_flipped_byte_of_the_committed_slot_is_refused",
        "fuzz/test_targets.py::test_target_takes_its_seeds",
    ),
    "O10": (
        "tpmd.c: one read was one command; a stale socket stopped the start",
        _TPM0 + "command_split_anywhere_gives_the_same_answer",
        "protocol/test_framing.py::test_stream_in_any_pieces_gives_the_same_commands",
        _LISTENERS + "socket_of_a_dead_process_is_replaced",
        _LISTENERS + "path_of_any_length_works",
    ),
    "O11": (
        "vtpm: a sleep of two seconds mended the start",
        "daemons/launcher/test_domains.py::test_chain_starts_in_order_and_everything_is_told",
        "system/test_errors.py::test_vtpm_waits_for_its_manager_and_says_so",
    ),
    "O12": (
        "vtpmmgr: a caller's nonce was printed",
        "protocol/test_manager_messages.py::test_hash_keys_are_not_shown",
        _OURS + "secrets_are_in_no_repr",
    ),
    "O13": (
        "tpm_emulator_extern.c: a kill while saving left an empty TPM",
        _CHIP_MEMORY + "power_loss_in_a_save_leaves_the_old_state_or_the_new",
        _LOST_POWER + "save_is_old_or_new_after_power_loss_at_any_step",
        _CHIP_MEMORY + "damage_of_both_slots_is_refused_and_left_as_it_is",
    ),
    "O3": (
        "disk_tpm.c: the rollback counter did nothing and said it had",
        _VAULT + "older_image_is_refused_as_rollback",
        "system/test_images.py::test_older_copy_of_a_vtpm_s_image_is_refused",
    ),
}  # fmt: skip

LATER = {
    "C18": "no verifier is there yet that could take an old quote",
    "C19": "no verifier is there yet that could miss a link",
    "C20": "no verifier is there yet that could fetch twice",
    "C21": "vTPM quotes by the manager are not there yet; ActivateIdentity has its own tests",
    "C26": "attestation and group updates are not there yet",
    "F5": "deep quotes are not there yet",
    "F16": "no registry of endorsement keys is there yet",
    "O9": "groups and the rotation of the manager's key are not there yet",
}
"""What belongs to work that is not done yet."""
