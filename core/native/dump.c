#define _GNU_SOURCE
#include "dump.h"

#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/procfs.h>
#include <sys/user.h>
#include <unistd.h>

enum { PAGE = 4096, ALIGN = 64 << 10 };

/* Notes are padded to 4 bytes, in 64-bit files too (core(5); the gABI says 8, and no core file ever had that). */
#define PADDED(n) (((n) + 3u) & ~3u)

/* The name, whose padding belongs to it, and the largest name that stands in one of our notes. */
struct note {
	Elf64_Nhdr head;
	char name[8];
};

struct prstatus_note {
	struct note note;
	struct elf_prstatus status;
} __attribute__((packed));

/* As QEMU writes it. What is behind cr[] came later: a reader looks at `size`. */
struct qemu_segment {
	uint32_t selector, limit, flags, pad;
	uint64_t base;
};

struct qemu_cpu {
	uint32_t version, size;
	uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
	uint64_t rip, rflags;
	struct qemu_segment cs, ds, es, fs, gs, ss;
	struct qemu_segment ldt, tr, gdt, idt;
	uint64_t cr[5];
	uint64_t kernel_gs_base;
};

struct qemu_note {
	struct note note;
	struct qemu_cpu cpu;
} __attribute__((packed));

static const char VMCOREINFO[] = "VMCOREINFO";

/* As the kernel lays it out: name and text follow the header. */
struct vmcoreinfo_head {
	Elf64_Nhdr head;
	char name[PADDED(sizeof(VMCOREINFO))];
};

static uint64_t notes_offset(uint32_t regions)
{
	return sizeof(Elf64_Ehdr) + (1 + (uint64_t)regions) * sizeof(Elf64_Phdr);
}

uint64_t mc_dump_start(uint32_t vcpus, uint32_t regions)
{
	uint64_t end = notes_offset(regions) + vcpus * (sizeof(struct prstatus_note) + sizeof(struct qemu_note)) +
		       sizeof(struct vmcoreinfo_head) + MC_DUMP_VMCOREINFO_MAX;

	return (end + ALIGN - 1) / ALIGN * ALIGN;
}

static struct note note(const char *name, uint32_t size, uint32_t type)
{
	struct note n = {{(Elf64_Word)strlen(name) + 1, size, type}, ""};

	strncpy(n.name, name, sizeof(n.name) - 1);
	return n;
}

static void set_prstatus(struct prstatus_note *out, uint32_t index, const struct mc_dump_vcpu *v)
{
	const struct kvm_regs *r = &v->regs;
	const struct kvm_sregs *s = &v->sregs;
	struct user_regs_struct user = {
		.r15 = r->r15, .r14 = r->r14, .r13 = r->r13, .r12 = r->r12, .rbp = r->rbp, .rbx = r->rbx,
		.r11 = r->r11, .r10 = r->r10, .r9 = r->r9, .r8 = r->r8, .rax = r->rax, .rcx = r->rcx,
		.rdx = r->rdx, .rsi = r->rsi, .rdi = r->rdi, .rip = r->rip, .cs = s->cs.selector,
		.eflags = r->rflags, .rsp = r->rsp, .ss = s->ss.selector, .fs_base = s->fs.base, .gs_base = s->gs.base,
		.ds = s->ds.selector, .es = s->es.selector, .fs = s->fs.selector, .gs = s->gs.selector,
	};
	struct elf_prstatus status = {.pr_pid = (pid_t)index + 1};	/* gdb takes 0 for no thread */

	_Static_assert(sizeof(status.pr_reg) == sizeof(user), "registers of a core file");
	memcpy(&status.pr_reg, &user, sizeof(user));
	out->note = note("CORE", sizeof(status), NT_PRSTATUS);
	out->status = status;
}

/* The flags stand as in the upper half of a descriptor (Intel SDM volume 3, 3.4.5). */
static struct qemu_segment segment(const struct kvm_segment *s)
{
	return (struct qemu_segment){
		.selector = s->selector,
		.limit = s->limit,
		.flags = (uint32_t)s->type << 8 | s->s << 12 | s->dpl << 13 | s->present << 15 | s->avl << 20 |
			 s->l << 21 | s->db << 22 | s->g << 23,
		.base = s->base,
	};
}

static struct qemu_segment table(const struct kvm_dtable *t)
{
	return (struct qemu_segment){.limit = t->limit, .base = t->base};
}

static void set_qemu(struct qemu_note *out, const struct mc_dump_vcpu *v)
{
	const struct kvm_regs *r = &v->regs;
	const struct kvm_sregs *s = &v->sregs;

	out->note = note("QEMU", sizeof(out->cpu), 0);
	out->cpu = (struct qemu_cpu){
		.version = 1, .size = sizeof(out->cpu),
		.rax = r->rax, .rbx = r->rbx, .rcx = r->rcx, .rdx = r->rdx,
		.rsi = r->rsi, .rdi = r->rdi, .rsp = r->rsp, .rbp = r->rbp,
		.r8 = r->r8, .r9 = r->r9, .r10 = r->r10, .r11 = r->r11,
		.r12 = r->r12, .r13 = r->r13, .r14 = r->r14, .r15 = r->r15,
		.rip = r->rip, .rflags = r->rflags,
		.cs = segment(&s->cs), .ds = segment(&s->ds), .es = segment(&s->es),
		.fs = segment(&s->fs), .gs = segment(&s->gs), .ss = segment(&s->ss),
		.ldt = segment(&s->ldt), .tr = segment(&s->tr), .gdt = table(&s->gdt), .idt = table(&s->idt),
		.cr = {s->cr0, 0, s->cr2, s->cr3, s->cr4},
		.kernel_gs_base = v->kernel_gs_base,
	};
}

static uint64_t put(uint8_t *out, uint64_t at, const void *data, size_t size)
{
	memcpy(out + at, data, size);
	return at + size;
}

static uint64_t put_notes(uint8_t *out, uint64_t at, const struct mc_dump_vcpu *vcpus, uint32_t n_vcpus,
			  const char *vmcoreinfo, uint32_t length)
{
	for (uint32_t i = 0; i < n_vcpus; i++) {
		struct prstatus_note n;

		set_prstatus(&n, i, &vcpus[i]);
		at = put(out, at, &n, sizeof(n));
	}
	for (uint32_t i = 0; i < n_vcpus; i++) {
		struct qemu_note n;

		set_qemu(&n, &vcpus[i]);
		at = put(out, at, &n, sizeof(n));
	}
	if (length) {
		struct vmcoreinfo_head head = {{sizeof(VMCOREINFO), length, 0}, "VMCOREINFO"};

		at = put(out, at, &head, sizeof(head));
		put(out, at, vmcoreinfo, length);
		at += PADDED(length);
	}
	return at;
}

uint64_t mc_dump_head(uint8_t *out, const struct mc_dump_vcpu *vcpus, uint32_t n_vcpus,
		      const struct mc_dump_region *regions, uint32_t n_regions, const char *vmcoreinfo, uint32_t length)
{
	uint64_t start = mc_dump_start(n_vcpus, n_regions), notes = notes_offset(n_regions), end, at;
	Elf64_Ehdr elf = {
		.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT, ELFOSABI_NONE},
		.e_type = ET_CORE,
		.e_machine = EM_X86_64,
		.e_version = EV_CURRENT,
		.e_phoff = sizeof(elf),
		.e_ehsize = sizeof(elf),
		.e_phentsize = sizeof(Elf64_Phdr),
		.e_phnum = 1 + n_regions,
	};
	Elf64_Phdr note = {.p_type = PT_NOTE, .p_offset = notes, .p_align = 4};

	memset(out, 0, start);
	end = put_notes(out, notes, vcpus, n_vcpus, vmcoreinfo, length);
	note.p_filesz = note.p_memsz = end - notes;
	at = put(out, 0, &elf, sizeof(elf));
	at = put(out, at, &note, sizeof(note));
	for (uint32_t i = 0; i < n_regions; i++) {
		/* There is no paging here: an address is a guest physical one, whichever way a debugger asks. */
		Elf64_Phdr load = {
			.p_type = PT_LOAD,
			.p_flags = PF_R | PF_W | PF_X,
			.p_offset = start + regions[i].offset,
			.p_vaddr = regions[i].gpa,
			.p_paddr = regions[i].gpa,
			.p_filesz = regions[i].size,
			.p_memsz = regions[i].size,
			.p_align = PAGE,
		};

		at = put(out, at, &load, sizeof(load));
	}
	return end;
}

/* The length of the text of the note that this page of `left` bytes begins with, or 0. */
static uint32_t vmcoreinfo_length(const uint8_t *page, size_t left)
{
	struct vmcoreinfo_head head;

	if (left < sizeof(head))
		return 0;
	memcpy(&head, page, sizeof(head));
	if (head.head.n_namesz != sizeof(VMCOREINFO) || head.head.n_type != 0 ||
	    memcmp(head.name, VMCOREINFO, sizeof(VMCOREINFO)) || head.head.n_descsz > MC_DUMP_VMCOREINFO_MAX)
		return 0;
	return head.head.n_descsz;
}

static ssize_t read_some(int fd, void *data, size_t size, uint64_t offset)
{
	size_t got = 0;

	while (got < size) {
		ssize_t n = pread(fd, (uint8_t *)data + got, size - got, offset + got);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		got += n;
	}
	return got;
}

int64_t mc_dump_find_vmcoreinfo(int fd, uint64_t start, uint64_t size, uint64_t from, char *out, uint32_t *length)
{
	uint8_t *buffer = malloc(ALIGN);
	int64_t result = size;

	if (!buffer)
		return -ENOMEM;
	while (from < size) {
		off_t data = lseek(fd, start + from, SEEK_DATA);
		ssize_t got;

		if (data < 0) {
			result = errno == ENXIO ? (int64_t)size : -errno;	/* nothing but a hole follows */
			break;
		}
		from = (data - start) / PAGE * PAGE;
		got = from < size ? read_some(fd, buffer, size - from < ALIGN ? size - from : ALIGN, start + from) : 0;
		if (got <= 0) {
			result = got ? got : (int64_t)size;
			break;
		}
		for (ssize_t at = 0; at < got; at += PAGE) {
			ssize_t text;

			*length = vmcoreinfo_length(buffer + at, got - at);
			if (!*length)
				continue;
			text = from + at + sizeof(struct vmcoreinfo_head);
			if (*length > size - text)
				*length = size - text;
			text = read_some(fd, out, *length, start + text);
			result = text < 0 ? text : (int64_t)from + at;
			if (text >= 0)
				*length = text;
			free(buffer);
			return result;
		}
		from += got;
	}
	free(buffer);
	return result;
}
