"""Names of CPUID's feature bits: Linux's (arch/x86/include/asm/cpufeatures.h), as /proc/cpuinfo shows them."""

from __future__ import annotations

# Leaf, subleaf and register, and a name a bit from bit 0 on. "-": reserved, or without a name.
# Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; KVM's own: Documentation/virt/kvm/x86/cpuid.rst.
_WORDS = {
    (0x1, 0, "edx"): """
        fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse
        sse2 ss ht tm ia64 pbe""",
    (0x1, 0, "ecx"): """
        pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1
        sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor""",
    (0x7, 0, "ebx"): """
        fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a
        avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni
        avx512bw avx512vl""",
    (0x7, 0, "ecx"): """
        prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni
        avx512_bitalg tme avx512_vpopcntdq - la57 mawau0 mawau1 mawau2 mawau3 mawau4 rdpid keylocker bus_lock_detect
        cldemote - movdiri movdir64b enqcmd sgx_lc pks""",
    (0x7, 0, "edx"): """
        - sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear
        rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16
        avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities
        spec_ctrl_ssbd""",
    (0x7, 1, "eax"): """
        sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred
        lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist""",
    (0x7, 1, "edx"): "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti",
    (0x7, 2, "edx"): "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    (0xD, 0, "eax"): """
        xcr0.x87 xcr0.sse xcr0.avx xcr0.bndregs xcr0.bndcsr xcr0.opmask xcr0.zmm_hi256 xcr0.hi16_zmm xcr0.pt
        xcr0.pkru xcr0.pasid xcr0.cet_u xcr0.cet_s xcr0.hdc xcr0.uintr xcr0.lbr xcr0.hwp xcr0.tilecfg xcr0.tiledata""",
    (0xD, 0, "edx"): "",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0xD, 1, "ecx"): "- - - - - - - - xss.pt - xss.pasid xss.cet_u xss.cet_s xss.hdc xss.uintr xss.lbr xss.hwp",
    (0x40000001, 0, "eax"): """
        kvmclock_old kvm_nop_io_delay kvm_mmu_op kvmclock kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt -
        kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int
        kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvmclock_stable""",
    (0x80000001, 0, "edx"): """
        fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr
        fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow""",
    (0x80000001, 0, "ecx"): """
        lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp
        fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx""",
    (0x80000007, 0, "ebx"): "overflow_recov succor - smca",
    (0x80000007, 0, "edx"): "- - - - - - - - constant_tsc",
    (0x80000008, 0, "ebx"): """
        clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - amd_stibp_always_on -
        - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret brs""",
    (0x80000021, 0, "eax"): """
        no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs no_smm_ctl_msr - - - - - - - - prefetchi
        - - - - - - - - sbpb ibpb_brtype srso_no""",
}
_NAMES = {word: names.split() for word, names in _WORDS.items()}

WORDS = tuple(_NAMES)
"""The registers of CPUID whose bits are features: leaf, subleaf, register."""

_NOT_FEATURES = {
    # What the guest's own CR4 says, and a number of 5 bits.
    (0x1, 0, "ecx"): 1 << 27,
    (0x7, 0, "ecx"): 1 << 4 | 0x1F << 17,
}


def feature_bits(word: tuple[int, int, str], value: int) -> int:
    """The bits of a register that are features."""
    return value & ~_NOT_FEATURES.get(word, 0)


def names(word: tuple[int, int, str], bits: int) -> list[str]:
    """What the set bits of a register are called."""
    known, found = _NAMES[word], []
    for bit in range(32):
        if bits >> bit & 1:
            name = known[bit] if bit < len(known) else "-"
            found.append(f"CPUID {word[0]:#x}.{word[1]:x} {word[2].upper()} bit {bit}" if name == "-" else name)
    return found
