/*
 * Entered by the PVH protocol (32-bit, paging off, EBX: hvm_start_info); turns on long mode with the first 4 GiB
 * mapped one to one for everybody, and calls guest_main(start_info) at CPL 3 with IOPL 3. The KVM that this is
 * tested on emulates CPL 0 at about 2 us an instruction, so whatever can be is laid out by the assembler.
 *
 * ud2 at CPL 3 calls the function in RDI at CPL 0 with RSI as its argument (a pagetable KVM delivers exceptions, but
 * no software interrupts). Vector 0x30 is an interrupt: it counts and ends the interrupt at the LAPIC. Other
 * exceptions have no gates: they end in a triple fault.
 */
	.set CODE0, 0x10
	.set DATA0, 0x18
	.set CODE3, 0x28 | 3
	.set DATA3, 0x20 | 3
	.set TSS_SEL, 0x30
	.set TSS, 0x200000		/* link.ld */
	.set TSS_SPACING, 0x2100
	.set TSS_LIMIT, 0x68 + 8192
	.set STACK_SIZE, 16384

	.section .note.pvh, "a", @note
	.align 4
	.long 4, 4, 18			/* XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz "Xen"
	.long start

	/* All ports are open to CPL 3 by the I/O bitmap: IOPL alone is not enough on a KVM that loses it in iretq. */
	.macro	task_state stack
	.long	0
	.quad	\stack			/* RSP0 */
	.fill	90, 1, 0
	.word	0x68			/* the bitmap's place */
	.fill	8192, 1, 0
	.byte	0xff
	.endm
	.section .tss, "aw"
	task_state stack0_top
	.org	TSS_SPACING
	task_state stack1_top		/* the second processor's */

	.text
	.code32
	.globl start
start:
	lgdt	gdt_pointer
	movl	$page_tables, %eax
	movl	%eax, %cr3
	movl	%cr4, %eax
	orl	$0x20, %eax		/* PAE */
	movl	%eax, %cr4
	movl	$0xc0000080, %ecx	/* EFER */
	rdmsr
	orl	$0x100, %eax		/* LME */
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000001, %eax	/* PG, PE */
	movl	%eax, %cr0
	ljmpl	$CODE0, $start64

	.code64
start64:
	movl	$DATA0, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	$stack0_top, %esp
	movl	$TSS_SEL, %eax
	ltr	%ax
	lidt	idt_pointer
	movl	%ebx, %edi
	pushq	$DATA3
	pushq	$stack3_top
	pushq	$0x3002			/* IOPL 3 */
	pushq	$CODE3
	pushq	$enter3
	iretq
enter3:
	xorl	%ebp, %ebp
	call	guest_main
1:	jmp	1b

/* #UD, by the ud2 of kernel(): RDI(RSI) at CPL 0; RAX is its result. */
	.globl	gate_call
gate_call:
	addq	$2, (%rsp)		/* past the ud2 */
	movq	%rdi, %rax
	movq	%rsi, %rdi
	call	*%rax
	iretq

	.globl	gate_irq
gate_irq:
	pushq	%rax
	lock incl interrupts
	movl	$0xfee000b0, %eax	/* EOI */
	movl	$0, (%rax)
	popq	%rax
	iretq

	.globl	gate_spurious
gate_spurious:
	iretq

/* At CPL 0: sleeps until an interrupt. `sti; hlt` is what closes the race with it. */
	.globl	do_halt
do_halt:
	sti
	hlt
	cli
	ret

/* At CPL 0: interrupts on at CPL 3 from now on, by way of the flags that iretq will load (RFLAGS lies above the
 * return address, RIP and CS). */
	.globl	do_enable_interrupts
do_enable_interrupts:
	orq	$0x200, 24(%rsp)
	ret

	.globl	do_cpuid
do_cpuid:				/* RDI: uint32_t[4], EAX and ECX in, all four out */
	pushq	%rbx
	movl	(%rdi), %eax
	movl	8(%rdi), %ecx
	cpuid
	movl	%eax, (%rdi)
	movl	%ebx, 4(%rdi)
	movl	%ecx, 8(%rdi)
	movl	%edx, 12(%rdi)
	popq	%rbx
	ret

	.globl	do_triple_fault
do_triple_fault:
	lidt	no_idt
	movl	$0x1badb002, %eax
	ud2

	.globl	do_unemulated			/* what a KVM that emulates CPL 0 cannot do, and hardware can */
do_unemulated:
	xrstor	xrstor_area
	ret

/* Where INIT-SIPI starts the second processor, copied to AP_PAGE: real mode, IP 0. */
	.set AP_PAGE, 0x8000
	.code16
	.globl	ap_start, ap_end
ap_start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	lgdtl	AP_PAGE + (ap_gdt_pointer - ap_start)
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$0x40, $ap32		/* a 32-bit code segment */
	.align	8
ap_gdt_pointer:
	.word	gdt_end - gdt - 1
	.long	gdt
ap_end:
	.code32
ap32:
	movl	$DATA0, %eax
	movl	%eax, %ds
	movl	%eax, %ss
	movl	$page_tables, %eax
	movl	%eax, %cr3
	movl	%cr4, %eax
	orl	$0x20, %eax
	movl	%eax, %cr4
	movl	$0xc0000080, %ecx
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000001, %eax
	movl	%eax, %cr0
	ljmpl	$CODE0, $ap64
	.code64
ap64:
	movl	$stack1_top, %esp
	movl	$0x48, %eax
	ltr	%ax
	lidt	idt_pointer
	pushq	$DATA3
	pushq	$ap_stack3_top
	pushq	$0x3002
	pushq	$CODE3
	pushq	$ap_enter3
	iretq
ap_enter3:
	xorl	%ebp, %ebp
	call	ap_main
1:	jmp	1b

	.data
	.align	4096
page_tables:
	.quad	pdpt + 7
	.fill	511, 8, 0
pdpt:
	.quad	directories + 7, directories + 0x1007, directories + 0x2007, directories + 0x3007
	.fill	508, 8, 0
directories:
	.set	i, 0
	.rept	2048
	.quad	i * 0x200000 + 0x87	/* present, writable, user, large */
	.set	i, i + 1
	.endr

	.align	8
gdt:
	.quad	0, 0
	.quad	0x00af9b000000ffff	/* 0x10 CODE0 */
	.quad	0x00cf93000000ffff	/* 0x18 DATA0 */
	.quad	0x00cff3000000ffff	/* 0x20 DATA3 */
	.quad	0x00affb000000ffff	/* 0x28 CODE3 */
	.quad	0x0000890000000000 + TSS_LIMIT + (TSS << 16), 0	/* 0x30 TSS */
	.quad	0x00cf9b000000ffff	/* 0x40 32-bit code, on the second processor's way */
	.quad	0x0000890000000000 + TSS_LIMIT + ((TSS + TSS_SPACING) << 16), 0	/* 0x48 TSS of the second processor */
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.quad	gdt
idt_pointer:
	.word	0x100 * 16 - 1
	.quad	idt
no_idt:
	.word	0
	.quad	0
	.align	64
xrstor_area:
	.fill	576, 1, 0

	.bss
	.align	16
	.globl	idt, interrupts
idt:	.skip	4096
interrupts:
	.skip	4
	.align	16
	.skip	STACK_SIZE
stack0_top:
	.skip	STACK_SIZE
stack3_top:
	.skip	STACK_SIZE
stack1_top:
	.skip	STACK_SIZE
ap_stack3_top:
	.section .note.GNU-stack, "", @progbits
