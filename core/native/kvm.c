#include "kvm.h"

#include <errno.h>
#include <sys/ioctl.h>

long mc_ioctl(int fd, unsigned long request, void *arg)
{
	return mc_ioctl_value(fd, request, (unsigned long)arg);
}

long mc_ioctl_value(int fd, unsigned long request, unsigned long arg)
{
	long ret;

	do
		ret = ioctl(fd, request, arg);
	while (ret < 0 && errno == EINTR);
	return ret < 0 ? -(long)errno : ret;
}

long mc_mask_pics(int vm_fd)
{
	static const uint32_t pics[] = { KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE };

	for (size_t i = 0; i < sizeof(pics) / sizeof(pics[0]); i++) {
		struct kvm_irqchip chip = { .chip_id = pics[i] };
		long ret = mc_ioctl(vm_fd, KVM_GET_IRQCHIP, &chip);

		if (ret < 0)
			return ret;
		chip.chip.pic.imr = 0xff;
		ret = mc_ioctl(vm_fd, KVM_SET_IRQCHIP, &chip);
		if (ret < 0)
			return ret;
	}
	return 0;
}
